"""One test per place where the GPU backend leans on something in vLLM: each fails when vLLM moves it."""

import ast
import inspect
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from latent_batches import SCALE, Dims, engine_config
from served_models import served_checkpoint
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora import model_manager
from vllm.model_executor.layers.attention.mla_attention import MLAAttention, MLACommonPrefillMetadata
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import backend as vllm_backend
from vllm.v1.attention.backends.mla.prefill import MLAPrefillBackend

import ic_vllm_plugin
from ic_vllm_plugin import attention, compat, gpu_defaults, metadata, prefill, workspace
from ic_vllm_plugin.latent_impl import LatentImplBase
from ic_vllm_plugin.prefill_backend import OpsPrefillBackend

DIMS = Dims(256, 64, 128, 128, 4)


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def test_custom_is_our_backend_for_attention_and_for_prefill():
    ic_vllm_plugin.register()
    assert compat.AttentionBackendEnum.CUSTOM.get_class() is attention.LatentBackend
    assert compat.MLAPrefillBackendEnum.CUSTOM.get_class() is OpsPrefillBackend


def test_our_choice_survives_the_way_to_the_engines_process():
    # a backend of a name of its own, which vLLM 0.32 offers, does not: the other process does not know it yet
    chosen = AttentionConfig(
        backend=compat.AttentionBackendEnum.CUSTOM, mla_prefill_backend=compat.MLAPrefillBackendEnum.CUSTOM
    )
    arrived = pickle.loads(pickle.dumps(chosen))
    assert arrived.backend is chosen.backend and arrived.mla_prefill_backend is chosen.mla_prefill_backend


def test_another_plugins_custom_backend_stays(monkeypatch):
    ic_vllm_plugin.register()
    custom = compat.AttentionBackendEnum.CUSTOM
    compat.register_backend(custom, "theirs.Backend")
    said = []
    monkeypatch.setattr(compat, "logger", lambda: SimpleNamespace(warning=lambda *words: said.append(words)))
    try:
        compat.register_backends()
        assert custom.get_path() == "theirs.Backend"
        assert "takes part for its own architecture only" in said[0][0]
    finally:
        custom.clear_override()
        compat.register_backends()
    assert custom.get_path() == compat.BACKEND_CLASS


@pytest.mark.parametrize(
    "method", ("forward_mqa", "forward_mha", "do_kv_cache_update", "fused_output_quant_supported")
)
def test_methods_of_the_impl_take_what_vllm_hands_over(method):
    theirs = getattr(vllm_backend.MLAAttentionImpl, method)
    assert parameters(getattr(attention.LatentImpl, method)) == parameters(theirs)


def test_the_impl_is_made_with_arguments_that_vllm_has():
    ours = parameters(LatentImplBase.__init__) - {"other_mla_args"}
    assert ours <= parameters(vllm_backend.MLAAttentionImpl.__init__)


@pytest.mark.parametrize("method", ("__init__", "build"))
def test_methods_of_the_builder_take_what_vllm_hands_over(method):
    theirs = getattr(vllm_backend.AttentionMetadataBuilder, method)
    assert parameters(getattr(metadata.LatentMetadataBuilder, method)) == parameters(theirs)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"head_size": 256, "kv_cache_dtype": "fp8", "device_capability": DeviceCapability(7, 5)}, []),
        ({"use_mla": False}, ["non-MLA not supported"]),
        ({"use_sparse": True}, ["sparse not supported"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["kv_cache_dtype not supported"]),
        ({"block_size": 16}, ["block_size not supported"]),
        ({"device_capability": DeviceCapability(7, 0)}, ["compute capability not supported"]),
    ],
)
def test_what_vllm_is_told_when_our_backend_is_asked_for_by_name(changes, reasons):
    asked = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 64,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(8, 0),
        "attn_type": "decoder",
    }
    assert attention.LatentBackend.validate_configuration(**{**asked, **changes}) == reasons


def test_gpus_that_do_not_divide_the_heads_are_refused(monkeypatch):
    # what the platform sets on the way is put back
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = EngineArgs(model=str(served_checkpoint()), tensor_parallel_size=3, max_model_len=1024)
    with pytest.raises(
        ValueError, match=r"attention heads \(4\) must be divisible by tensor parallel size \(3\)"
    ):
        arguments.create_engine_config()


def test_nothing_is_abstract_in_our_classes():
    for ours in (
        attention.LatentBackend,
        metadata.LatentMetadataBuilder,
        attention.LatentImpl,
        OpsPrefillBackend,
    ):
        assert not inspect.isabstract(ours)


def test_the_attributes_by_which_vllm_asks_what_an_impl_can_exist():
    for name in ("can_return_lse_for_decode", "lse_base_on_e", "supports_pcp", "supports_dcp"):
        assert hasattr(vllm_backend.AttentionImplBase, name)


def test_drafts_that_are_trimmed_on_the_device_alone_are_declined():
    name = "supports_device_cpu_query_lens_mismatch"
    # vLLM 0.26 has no such drafts
    assert hasattr(vllm_backend.AttentionBackend, name) or compat.vllm_version().minor < 32
    assert getattr(attention.LatentBackend, name)() is False


def test_the_batch_has_what_the_builder_reads():
    fields = set(vllm_backend.CommonAttentionMetadata.__dataclass_fields__)
    assert fields >= {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "block_table_tensor",
        "slot_mapping",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
    }


def test_the_layer_takes_a_backend_and_keeps_its_profiled_rows_where_we_set_them():
    assert {"attn_backend", "kv_b_proj"} <= parameters(MLAAttention.__init__)
    assert compat.PROFILED_ROWS in inspect.getsource(MLAAttention.chunked_prefill_workspace_size.fget)
    layer = SimpleNamespace(**{compat.PROFILED_ROWS: None})
    compat.set_profiled_rows(layer, 123)
    assert MLAAttention.chunked_prefill_workspace_size.fget(layer) == 123
    with pytest.raises(AssertionError, match="_chunked_prefill_workspace_size"):
        compat.set_profiled_rows(SimpleNamespace(), 1)


def test_vllms_profile_counts_what_our_prefill_takes():
    # of the shape of ic-1b; 7.2 GiB are what vLLM may use of 8
    layer = SimpleNamespace(
        num_heads=32,
        kv_lora_rank=256,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        **{compat.PROFILED_ROWS: None},
    )
    workspace.count_in_profile(engine_config(torch.float16, prefill_workspace_mib=115), layer)
    profiled_bytes = getattr(layer, compat.PROFILED_ROWS) * 32 * 256 * 2
    assert 100 * 2**20 < profiled_bytes < 256 * 2**20, "vLLM's own would be 1 GiB"


def test_flash_attention_takes_what_we_hand_over():
    # read, not imported: without its CUDA library the module raises
    file = Path(vllm.__file__).parent.joinpath(*compat.FLASH_ATTN_MODULE.split(".")[1:]).with_suffix(".py")
    functions = {
        node.name: node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
    }
    taken = {argument.arg for argument in functions["flash_attn_varlen_func"].args.args}
    assert taken >= {
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "softmax_scale",
    }
    assert taken >= {"causal", "return_softmax_lse", "fa_version"}
    assert [argument.arg for argument in functions["is_fa_version_supported"].args.args] == ["fa_version"]


@pytest.mark.parametrize("method", ("run_prefill_new_tokens", "run_prefill_context_chunk"))
def test_methods_of_the_prefill_take_what_vllm_hands_over(method):
    theirs = getattr(MLAPrefillBackend, method)
    assert parameters(theirs) <= parameters(getattr(OpsPrefillBackend, method))


def ops_prefill() -> OpsPrefillBackend:
    shape = {
        "num_heads": DIMS.heads,
        "scale": SCALE,
        "kv_lora_rank": DIMS.latent,
        "qk_nope_head_dim": DIMS.nope,
        "qk_rope_head_dim": DIMS.rope,
        "v_head_dim": DIMS.value,
        "vllm_config": engine_config(),
    }
    # as the metadata builder does
    return OpsPrefillBackend(**shape).clone()


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("tnd,snd->nts", q, k) * SCALE
    if causal:
        scores.masked_fill_(torch.ones(len(q), len(k)).triu(1).bool(), -torch.inf)
    return torch.einsum("nts,snv->tnv", scores.softmax(-1), v), scores.logsumexp(-1)


def test_prefill_of_new_tokens_and_of_a_chunk_in_the_words_of_both_releases():
    torch.manual_seed(0)
    q, k = torch.randn(7, 4, 192), torch.randn(33, 4, 192)
    v, starts = torch.randn(33, 4, 128), torch.tensor([0, 7], dtype=torch.int32)
    keys = torch.tensor([0, 33], dtype=torch.int32)
    ours = ops_prefill()
    ours.prepare_metadata(
        SimpleNamespace(
            query_start_loc=starts,
            max_query_len=7,
            chunked_context=SimpleNamespace(cu_seq_lens=[keys], max_seq_lens=[33]),
        )
    )
    expected, lse = plain(q, k[:7], v[:7], causal=True)
    out = ours.run_prefill_new_tokens(q=q, k=k[:7], v=v[:7], return_softmax_lse=True)
    torch.testing.assert_close(out, (expected, lse))
    torch.testing.assert_close(ours.run_prefill_new_tokens(q, k[:7], v[:7], False), expected)
    expected = plain(q, k, v, causal=False)
    torch.testing.assert_close(ours.run_prefill_context_chunk(chunk_idx=0, q=q, k=k, v=v), expected)
    chunk = SimpleNamespace(query_start_loc=starts, max_query_len=7, cu_seq_lens=keys, max_seq_len=33)
    torch.testing.assert_close(ours.run_prefill_context_chunk(chunk=chunk, q=q, k=k, v=v), expected)


def test_a_chunk_of_context_has_what_our_prefill_reads():
    if hasattr(MLACommonPrefillMetadata, "ContextChunk"):
        fields = MLACommonPrefillMetadata.ContextChunk.__dataclass_fields__
        assert set(fields) >= {"query_start_loc", "max_query_len", "cu_seq_lens", "max_seq_len"}
    else:
        # vLLM 0.26
        fields = MLACommonPrefillMetadata.ChunkedContextMetadata.__dataclass_fields__
        assert set(fields) >= {"cu_seq_lens", "max_seq_lens"}
    assert set(MLACommonPrefillMetadata.__dataclass_fields__) >= {"query_start_loc", "max_query_len"}


def test_a_plain_projection_is_told_from_a_quantised_one():
    assert "self.quant_method = UnquantizedLinearMethod()" in inspect.getsource(LinearBase)
    assert compat.has_plain_weight(SimpleNamespace(quant_method=compat.UnquantizedLinearMethod()))
    assert not compat.has_plain_weight(SimpleNamespace(quant_method=object()))
    assert not compat.has_plain_weight(torch.nn.Linear(8, 8)), "an adapter's layer around one has none"


class OtherModel:
    pass


def test_adapters_of_other_models_may_have_a_kv_b_proj(monkeypatch):
    original = model_manager.get_supported_lora_modules
    monkeypatch.setattr(model_manager, "get_supported_lora_modules", lambda model: ["kv_b_proj", "o_proj"])
    compat.refuse_lora_on("kv_b_proj")
    ours = type(compat.ARCHITECTURE, (), {})()
    assert model_manager.get_supported_lora_modules(ours) == ["o_proj"]
    assert model_manager.get_supported_lora_modules(OtherModel()) == ["kv_b_proj", "o_proj"]
    once = model_manager.get_supported_lora_modules
    compat.refuse_lora_on("kv_b_proj")
    assert model_manager.get_supported_lora_modules is once
    assert callable(original)


def configured(capability: int | None, monkeypatch: Any, **attention_fields: Any) -> Any:
    monkeypatch.setattr(compat, "compute_capability", lambda: capability)
    config = engine_config()
    config.attention_config = SimpleNamespace(
        **{"backend": None, "backend_per_kind": {}, "mla_prefill_backend": None, **attention_fields}
    )
    config.model_config.hf_config = SimpleNamespace(
        qk_nope_head_dim=DIMS.nope, qk_rope_head_dim=DIMS.rope, v_head_dim=DIMS.value
    )
    gpu_defaults.apply_gpu_defaults(config)
    return config


@pytest.mark.parametrize("capability", (75, 80, 90, None))
def test_our_prefill_is_chosen_without_flags_and_the_users_choice_stays(monkeypatch, capability):
    custom = compat.MLAPrefillBackendEnum.CUSTOM
    assert configured(capability, monkeypatch).attention_config.mla_prefill_backend is custom
    theirs = compat.MLAPrefillBackendEnum.FLASH_ATTN
    kept = configured(capability, monkeypatch, mla_prefill_backend=theirs)
    assert kept.attention_config.mla_prefill_backend is theirs


def test_vllms_own_attention_keeps_its_prefill_except_where_that_cannot_run(monkeypatch):
    triton = {"backend": compat.AttentionBackendEnum.TRITON_MLA}
    assert configured(80, monkeypatch, **triton).attention_config.mla_prefill_backend is None
    custom = compat.MLAPrefillBackendEnum.CUSTOM
    assert configured(75, monkeypatch, **triton).attention_config.mla_prefill_backend is custom


def test_context_parallelism_is_refused_and_what_helps_is_said(monkeypatch):
    config = engine_config()
    config.parallel_config.decode_context_parallel_size = 2
    config.attention_config = SimpleNamespace(backend=None, backend_per_kind={}, mla_prefill_backend=None)
    with pytest.raises(ValueError, match=r"decode_context_parallel_size is 2; .* accepts 1.*TRITON_MLA"):
        gpu_defaults.apply_gpu_defaults(config)


@pytest.mark.parametrize(
    ("capability", "fa3", "dims", "chosen"),
    [
        (90, True, (192, 128), ("flash_attn", None)),
        (90, False, (192, 128), ("ops", None)),
        (90, True, (128, 64), ("ops", None)),
        (100, True, (192, 128), ("ops", None)),
        (80, True, (192, 128), ("ops", None)),
        (75, True, (192, 128), ("ops", None)),
    ],
)
def test_flash_attention_3_is_taken_on_hopper_where_it_takes_the_dimensions(
    monkeypatch, capability, fa3, dims, chosen
):
    monkeypatch.setattr(compat, "compute_capability", lambda: capability)
    monkeypatch.setattr(compat, "has_flash_attn_3", lambda: fa3)
    shape = {"query_dim": dims[0], "value_dim": dims[1], "dtype": torch.bfloat16}
    assert prefill.prefill_kernel(None, **shape) == chosen
    assert prefill.prefill_kernel("ops", **shape) == ("ops", None)
    assert prefill.prefill_kernel("torch", **shape) == ("ops", "torch")


def test_without_a_gpu_nothing_is_asked_of_one():
    assert not current_platform.is_cuda()
    assert compat.compute_capability() is None
    assert compat.device_memory_bytes() == 0
    assert not compat.has_flash_attn_3()
