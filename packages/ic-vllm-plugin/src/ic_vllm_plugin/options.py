"""Options of the plugin: `vllm serve MODEL --additional-config '{"infinite_context": {...}}'`.

None is needed to serve. They choose kernels, for measurements and for trying on one card what another would run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "infinite_context"
DECODE = ("hopper", "turing", "triton", "reference")
# without cudnn, which returns no log-sum-exp: attention to cached context could not be merged
PREFILL = ("flash_attn", "ops", "triton", "gluon", "torch", "reference")
MOST = {"prefill_workspace_mib": 65536, "absorbed_tokens": 256}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user chose; None leaves the choice to the plugin.

    Args:
        decode: implementation of `ic_model.ops.mla_decode`.
        prefill: "flash_attn", "ops", or an implementation of `ic_model.ops.mla_prefill`.
        prefill_workspace_mib: memory into which cached context is expanded at a time.
        absorbed_tokens: requests of up to so many new tokens, such as questions behind a cached document, run in
            latent space like decode steps do, and expand nothing. None: decode steps only.
    """

    decode: str | None = None
    prefill: str | None = None
    prefill_workspace_mib: int | None = None
    absorbed_tokens: int | None = None


def read_options(vllm_config: VllmConfig) -> Options:
    """The options in a VllmConfig's additional_config.

    Raises:
        ValueError: names the option, its value and what is accepted.
    """
    additional = vllm_config.additional_config
    section = additional.get(SECTION, {}) if isinstance(additional, Mapping) else {}
    return parse_options(section)


def parse_options(section: Any) -> Options:
    """Check the section of additional_config; see `read_options`."""
    if not isinstance(section, Mapping):
        raise ValueError(f"additional_config[{SECTION!r}] is {section!r}; accepted: an object")
    names = [field.name for field in fields(Options)]
    unknown = sorted(set(section) - set(names))
    if unknown:
        raise ValueError(f"additional_config[{SECTION!r}] has {unknown}; accepted: {', '.join(names)}")
    for name, accepted in (("decode", DECODE), ("prefill", PREFILL)):
        value = section.get(name)
        if value is not None and value not in accepted:
            raise ValueError(
                f"additional_config[{SECTION!r}][{name!r}] is {value!r}; accepted: {', '.join(accepted)}"
            )
    for name, most in MOST.items():
        size = section.get(name)
        if size is not None and (
            not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most
        ):
            raise ValueError(f"additional_config[{SECTION!r}][{name!r}] is {size!r}; accepted: 1 to {most}")
    return Options(**section)
