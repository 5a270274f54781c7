"""Every place where the package leans on something in vLLM that may move."""

import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm
from served_models import served_checkpoint, users_environment
from vllm.platforms import current_platform

import ic_vllm_plugin
from ic_vllm_plugin import compat


@pytest.mark.parametrize("name", sorted(compat.SYMBOLS))
def test_symbol_is_where_it_is_expected(name):
    module, why = compat.SYMBOLS[name]
    assert hasattr(importlib.import_module(module), name), why
    assert getattr(compat, name) is not None


def test_the_operator_for_weights_of_4_bits_is_the_one_that_vllm_calls():
    # under another name it would seem to be missing everywhere; the wrapper is there on every processor
    module = importlib.import_module("vllm.model_executor.kernels.linear.mixed_precision.cpu")
    assert f"ops.{compat.CPU_KERNEL_OF_4_BITS}(" in Path(module.__file__).read_text()
    wrapper = getattr(importlib.import_module("vllm._custom_ops"), compat.CPU_KERNEL_OF_4_BITS)
    assert f"torch.ops._C.{compat.CPU_KERNEL_OF_4_BITS}(" in inspect.getsource(wrapper)


def test_an_unknown_symbol_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = compat.NoSuchThing


def test_registering_twice_is_fine():
    ic_vllm_plugin.register()
    wrapped = type(current_platform).check_and_update_config.__func__
    ic_vllm_plugin.register()
    assert type(current_platform).check_and_update_config.__func__ is wrapped
    assert vllm.ModelRegistry.models[compat.ARCHITECTURE].module_name == "ic_vllm_plugin.model"


@pytest.mark.parametrize("version", ("0.25.9", "0.33.0", "1.0"))
def test_another_vllm_is_refused_with_both_versions(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError) as refusal:
        ic_vllm_plugin.register()
    for said in (ic_vllm_plugin.__version__, f"vLLM {version} is installed", "0.26 to 0.32"):
        assert said in str(refusal.value)


@pytest.mark.parametrize("version", ("0.26.0", "0.32.0+cpu", "0.32.4", "0.32.1.dev3+g123"))
def test_supported_versions_are_accepted(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_vllm_version()


def test_an_unreadable_version_is_named(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "dev")
    with pytest.raises(RuntimeError, match="'dev'"):
        compat.check_vllm_version()


def in_fresh_python(code: str, *arguments: str) -> list[str]:
    """Lines that the code printed, what vLLM logged among them."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, env=users_environment()
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_importing_is_light():
    code = "import sys, ic_vllm_plugin; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    assert in_fresh_python(code)[-1] == "set()"


def test_registering_loads_no_model_code_and_no_cuda():
    code = (
        "import vllm, ic_vllm_plugin, sys, torch; ic_vllm_plugin.register(); "
        "print(torch.cuda.is_initialized(), 'ic_vllm_plugin.model' in sys.modules)"
    )
    assert in_fresh_python(code)[-1] == "False False"


def test_the_entry_point_names_register():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="infinite_context")
    assert entry.load() is ic_vllm_plugin.register


CONFIGURED = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(**json.loads(sys.argv[1])).create_engine_config()
print(json.dumps({
    "use_mla": config.model_config.use_mla,
    "head_size": config.model_config.get_head_size(),
    "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
    "step_tokens": config.scheduler_config.max_num_batched_tokens,
    "prefix_caching": config.cache_config.enable_prefix_caching,
    "page_tokens": config.cache_config.block_size,
    "kv_cache_bytes": config.cache_config.kv_cache_memory_bytes,
    "context_tokens": config.model_config.max_model_len,
}))
"""


def configured(checkpoint: Path, **arguments: Any) -> tuple[dict[str, Any], str]:
    """What vLLM makes of our checkpoint and these arguments in a process of its own, and what it logs."""
    lines = in_fresh_python(CONFIGURED, json.dumps({"model": str(checkpoint), **arguments}))
    return json.loads(lines[-1]), "\n".join(lines)


def test_cpu_defaults_survive_vllms_platform():
    result, log = configured(served_checkpoint())
    assert result["use_mla"] is True
    assert result["head_size"] == 256 + 64
    assert result["chunked_prefill"] is True
    assert result["step_tokens"] < 100_000
    assert result["prefix_caching"] is True
    assert result["page_tokens"] == compat.CPU_PAGE_TOKENS
    assert (result["context_tokens"] < 1_048_576) == ("Context capped at" in log)


def test_the_users_choices_survive_and_a_cap_is_logged():
    result, log = configured(
        served_checkpoint(),
        enable_prefix_caching=False,
        block_size=32,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=2**28,
    )
    assert result["prefix_caching"] is False
    assert result["page_tokens"] == 32
    assert result["step_tokens"] == 512
    assert result["kv_cache_bytes"] == 2**28
    # four layers of 320 bfloat16 numbers per token; one page is vLLM's own
    assert result["context_tokens"] == (2**28 // (32 * 4 * 320 * 2) - 1) * 32
    assert f"Context capped at {result['context_tokens']} of the model's 1048576 tokens" in log
