"""Everything in vLLM that this package uses and vLLM does not document, in one place, each with why.

vLLM documents the plugin entry point, `ModelRegistry.register_model`, the configuration objects'
fields and the layers of its guide for new models; those are imported where they are used. The rest
may move with any release: `SYMBOLS` lists it, and `tests/test_compat.py` fails when one has moved.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "InfiniteContextForCausalLM"
MODEL_CLASS = "ic_vllm_plugin.model:InfiniteContextForCausalLM"

BACKEND_CLASS = "ic_vllm_plugin.attention.LatentBackend"
PREFILL_BACKEND_CLASS = "ic_vllm_plugin.prefill_backend.OpsPrefillBackend"
FLASH_ATTN_MODULE = "vllm.vllm_flash_attn.flash_attn_interface"
PROFILED_ROWS = "_chunked_prefill_workspace_size"

# first supported, first not supported: (major, minor). 0.32.1 and later patches are accepted.
SUPPORTED_FROM = (0, 26)
UNSUPPORTED_FROM = (0, 33)
# the first vLLM whose CPU platform accepts MLA at all
CPU_FROM = (0, 32)

# tokens per page of the KV cache on the CPU: long enough to read well, and what vLLM itself takes
# on a CPU for other models. Prefix caching reuses whole pages.
CPU_PAGE_TOKENS = 128

# vLLM's operator for weights of 4 bits on a CPU
CPU_KERNEL_OF_4_BITS = "cpu_gemm_wna16"

# name here: (module, why it is needed)
SYMBOLS: dict[str, tuple[str, str]] = {
    "AttentionBackendEnum": (
        "vllm.v1.attention.backends.registry",
        "CUSTOM is the name for a backend from outside",
    ),
    "AttentionCGSupport": ("vllm.v1.attention.backend", "which CUDA graphs a backend's metadata allow"),
    "AttentionBackend": ("vllm.v1.attention.backend", "base of our backends' descriptions"),
    "AttentionMetadata": ("vllm.v1.attention.backend", "base of our backends' per-step metadata"),
    "AttentionMetadataBuilder": ("vllm.v1.attention.backend", "base of what makes that metadata"),
    "AttentionType": ("vllm.v1.attention.backend", "to refuse anything but decoder self-attention"),
    "CommonAttentionMetadata": ("vllm.v1.attention.backend", "what the builder is given each step"),
    "MLAAttention": (
        "vllm.model_executor.layers.attention",
        (
            "the layer that owns the latent cache and the absorbed projections; built directly because "
            "MultiHeadLatentAttentionWrapper needs both latent norms and passes no attn_backend on"
        ),
    ),
    "MLAAttentionImpl": ("vllm.v1.attention.backend", "base of our attention itself"),
    "MLAPrefillBackend": (
        "vllm.v1.attention.backends.mla.prefill",
        "base of our prefill for vLLM's own decode",
    ),
    "MLAPrefillBackendEnum": (
        "vllm.v1.attention.backends.mla.prefill",
        "CUSTOM is the name for one from outside",
    ),
    "MODELS_CONFIG_MAP": (
        "vllm.model_executor.models.config",
        "the hook by which an architecture adjusts a VllmConfig before the engine starts",
    ),
    "MODEL_ARCH_CONFIG_CONVERTORS": (
        "vllm.transformers_utils.model_arch_config_convertor",
        "decides by model_type whether a model has MLA; only vLLM's own are listed",
    ),
    "ModelArchConfigConvertorBase": (
        "vllm.transformers_utils.model_arch_config_convertor",
        "base of our entry in that list",
    ),
    "MultipleOf": ("vllm.v1.attention.backend", "to accept any page size that vLLM can choose"),
    "UnquantizedLinearMethod": (
        "vllm.model_executor.layers.linear",
        "to know a projection that is a plain matrix",
    ),
    "VerifyAndUpdateConfig": ("vllm.model_executor.models.config", "base of our entry in MODELS_CONFIG_MAP"),
    "get_memory_node_info": (
        "vllm.utils.cpu_resource_utils",
        "free memory as vLLM's CPU worker counts it, container limits included",
    ),
    "get_visible_memory_node": ("vllm.utils.cpu_resource_utils", "the NUMA nodes that worker may use"),
    "register_backend": ("vllm.v1.attention.backends.registry", "makes `--attention-backend CUSTOM` ours"),
    "register_mla_prefill_backend": (
        "vllm.v1.attention.backends.mla.prefill",
        (
            "a layer of MLA needs one, and vLLM's refuse most dimensions; on Turing its FlashAttention is chosen "
            "and fails at the first request"
        ),
    ),
    "split_decodes_and_prefills": (
        "vllm.v1.attention.backends.utils",
        "where, in the batch as the model runner ordered it, short queries end",
    ),
    "support_torch_compile": (
        "vllm.compilation.decorators",
        "lets vLLM compile the model, capture its graphs",
    ),
}


def __getattr__(name: str) -> Any:
    """Resolve a symbol of `SYMBOLS` on first use, so that importing this module imports no vLLM."""
    if name not in SYMBOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _symbol(name)


def _symbol(name: str) -> Any:
    return getattr(importlib.import_module(SYMBOLS[name][0]), name)


def vllm_version() -> Version:
    """The running vLLM's version.

    Raises:
        RuntimeError: vLLM is not installed or its version cannot be read.
    """
    try:
        import vllm
    except ImportError as error:
        raise RuntimeError(
            "ic-vllm-plugin needs vLLM, which is not installed; on GPUs: pip install 'ic-vllm-plugin[cuda]'"
        ) from error
    try:
        return Version(vllm.__version__)
    except InvalidVersion as error:
        raise RuntimeError(
            f"ic-vllm-plugin cannot read vLLM's version {vllm.__version__!r}; it supports {_supported()}"
        ) from error


def check_vllm_version() -> None:
    """Refuse a vLLM that this package was never run with.

    Raises:
        RuntimeError: names the version of this package, vLLM's and the supported range.
    """
    from ic_vllm_plugin import __version__

    version = vllm_version()
    if not SUPPORTED_FROM <= version.release[:2] < UNSUPPORTED_FROM:
        raise RuntimeError(
            f"ic-vllm-plugin {__version__} supports {_supported()}, but vLLM {version} is installed. "
            "Install a supported vLLM, or a newer ic-vllm-plugin. To serve other models meanwhile, "
            "set VLLM_PLUGINS to the plugins you want, or uninstall ic-vllm-plugin."
        )


def register_architecture() -> None:
    """Tell vLLM about the architecture. Idempotent; imports no model code and initialises no CUDA."""
    # importing it registers the configuration with AutoConfig, from which vLLM reads config.json
    from ic_model.configuration import ICConfig
    from vllm import ModelRegistry

    # by name: vLLM imports it in a process of its own to inspect it, so that CUDA stays untouched here
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    register_backends()
    _symbol("MODELS_CONFIG_MAP")[ARCHITECTURE] = _config_hook()
    _symbol("MODEL_ARCH_CONFIG_CONVERTORS")[ICConfig.model_type] = _mla_convertor()
    _keep_scheduling_on_cpu()


def register_backends() -> None:
    """Name our backends CUSTOM, unless another plugin was first. By path: nothing of theirs is imported."""
    for enum, register, path in (
        (_symbol("AttentionBackendEnum"), _symbol("register_backend"), BACKEND_CLASS),
        (
            _symbol("MLAPrefillBackendEnum"),
            _symbol("register_mla_prefill_backend"),
            PREFILL_BACKEND_CLASS,
        ),
    ):
        if not enum.CUSTOM.is_overridden():
            register(enum.CUSTOM, path)
        elif enum.CUSTOM.get_path() != path:
            logger().warning(
                "%s is %s already; InfiniteContext's takes part for its own architecture only.",
                enum.CUSTOM,
                enum.CUSTOM.get_path(),
            )


def current_vllm_config() -> VllmConfig:
    """The configuration of the engine whose model is being built."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def compute_capability() -> int | None:
    """Of the GPU, as one number: 90 is 9.0. None without one. Asked of the driver: no CUDA is initialised."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if capability is None else capability.to_int()


def device_memory_bytes() -> int:
    """Memory of the GPU; 0 without one."""
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory() if current_platform.is_cuda() else 0


@functools.cache
def has_flash_attn_3() -> bool:
    """Whether this vLLM's build of FlashAttention 3 loads."""
    try:
        interface = importlib.import_module(FLASH_ATTN_MODULE)
    except ImportError:
        return False
    return interface.is_fa_version_supported(3)


def flash_attn_3(q: Any, k: Any, v: Any, **lengths: Any) -> tuple[Any, Any]:
    """FlashAttention 3 over packed sequences, as vLLM builds it: output `[T, N, V]` and log-sum-exp `[N, T]`.

    Args:
        q, k, v: of `ic_model.ops.mla_prefill`.
        lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal.
    """
    function = importlib.import_module(FLASH_ATTN_MODULE).flash_attn_varlen_func
    return function(q, k, v, return_softmax_lse=True, fa_version=3, **lengths)


def set_profiled_rows(layer: Any, rows: int) -> None:
    """Set how many rows of `kv_b_proj`'s output the layer allocates in vLLM's memory profile.

    MLAAttention computes the number when it is first asked for and keeps it in this attribute.
    """
    assert hasattr(layer, PROFILED_ROWS), f"MLAAttention has no {PROFILED_ROWS}"
    setattr(layer, PROFILED_ROWS, rows)


def has_plain_weight(layer: Any) -> bool:
    """Whether a linear layer of vLLM multiplies by one matrix in the model's dtype, not by a quantised one.

    Args:
        layer: the layer.
    """
    return type(getattr(layer, "quant_method", None)) is _symbol("UnquantizedLinearMethod")


def refuse_lora_on(module: str) -> None:
    """Let vLLM refuse adapters for linear layers of this name, as it does for names that a model has not.

    vLLM lets adapters have every linear layer. `kv_b_proj` is folded into attention once, at the start: a part
    of an adapter for it would have no effect, and nobody would be told.
    """
    manager = importlib.import_module("vllm.lora.model_manager")
    original = manager.get_supported_lora_modules
    if module in getattr(original, "refuses", ()):
        return

    @functools.wraps(original)
    def get_supported_lora_modules(model: Any) -> list[str]:
        names = original(model)
        return [name for name in names if name != module] if type(model).__name__ == ARCHITECTURE else names

    vars(get_supported_lora_modules)["refuses"] = (*getattr(original, "refuses", ()), module)
    vars(manager)["get_supported_lora_modules"] = get_supported_lora_modules


def is_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def is_cuda() -> bool:
    """Whether vLLM runs on NVIDIA GPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def logger() -> Any:
    """A logger in vLLM's format: vLLM configures loggers below its own name only."""
    from vllm.logger import init_logger

    return init_logger("vllm.ic_vllm_plugin")


def available_cpu_memory_bytes() -> int:
    """Free bytes on the smallest memory node that vLLM's CPU workers may use, within container limits."""
    nodes = _symbol("get_visible_memory_node")() or [0]
    return min(_symbol("get_memory_node_info")(node).available_memory for node in nodes)


@functools.cache
def _mla_convertor() -> type:
    class InfiniteContextConvertor(_symbol("ModelArchConfigConvertorBase")):
        """Says that the model has MLA: head size C + R, one shared latent instead of KV heads."""

        def is_deepseek_mla(self) -> bool:
            return True

    return InfiniteContextConvertor


@functools.cache
def _config_hook() -> type:
    class InfiniteContextConfigHook(_symbol("VerifyAndUpdateConfig")):
        """Adjusts a VllmConfig for our architecture, before vLLM's platform does."""

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            """Set what the user did not, in place; a ValueError says what cannot be served."""
            if is_cpu():
                from ic_vllm_plugin.cpu_defaults import apply_cpu_defaults

                apply_cpu_defaults(vllm_config)
            elif is_cuda():
                from ic_vllm_plugin.gpu_defaults import apply_gpu_defaults

                apply_gpu_defaults(vllm_config)

    return InfiniteContextConfigHook


def lacks_cpu_kernel_of_4_bits() -> bool:
    """Whether this is an x86 processor without AVX-512: vLLM's build for it cannot multiply by weights of 4 bits.

    vLLM takes its only such kernel without asking, and fails in the first step with an AttributeError. Other
    architectures have kernels of their own.
    """
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    # loads the build for this processor
    importlib.import_module("vllm._custom_ops")
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return x86 and not hasattr(torch.ops._C, CPU_KERNEL_OF_4_BITS)


def _keep_scheduling_on_cpu() -> None:
    """Let chunked prefill and prefix caching stay on for our architecture on the CPU.

    vLLM's CPU platform turns both off for every MLA model, takes max_num_batched_tokens =
    max_model_len and forces pages of 16 tokens, because its own CPU attention can do neither. Ours
    can, and at a million tokens it could not run without: so the method is wrapped, and what the
    user or vLLM's defaults had chosen is put back for our architecture only.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    original = platform.check_and_update_config.__func__
    if getattr(original, "keeps_scheduling_for", None) == ARCHITECTURE:
        return

    @functools.wraps(original)
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        """vLLM's, after which our architecture gets back what it had been configured with."""
        model_config = vllm_config.model_config
        if model_config is None or model_config.architecture != ARCHITECTURE:
            original(cls, vllm_config)
            return
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chosen = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        prefix_caching = cache.enable_prefix_caching
        page_tokens = cache.block_size if cache.user_specified_block_size else CPU_PAGE_TOKENS
        original(cls, vllm_config)
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chosen
        cache.enable_prefix_caching = prefix_caching
        cache.block_size = page_tokens
        _log_kept(vllm_config)

    # an attribute, so that a second registration finds its own wrapper
    vars(check_and_update_config)["keeps_scheduling_for"] = ARCHITECTURE
    platform.check_and_update_config = classmethod(check_and_update_config)


def _log_kept(vllm_config: VllmConfig) -> None:
    # contradicts a line that vLLM has just logged, so it has to be said
    logger().info(
        "InfiniteContext's CPU attention keeps chunked prefill %s (up to %d tokens a step) and prefix "
        "caching %s, whatever the line above says.",
        "on" if vllm_config.scheduler_config.enable_chunked_prefill else "off",
        vllm_config.scheduler_config.max_num_batched_tokens,
        "on" if vllm_config.cache_config.enable_prefix_caching else "off",
    )


def _supported() -> str:
    low, high = SUPPORTED_FROM, UNSUPPORTED_FROM
    return f"vLLM {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} (on a CPU: {CPU_FROM[0]}.{CPU_FROM[1]})"
