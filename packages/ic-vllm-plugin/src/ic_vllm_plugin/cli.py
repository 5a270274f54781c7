"""`ic-vllm-plugin check MODEL --gpu-memory-gib 8 --max-model-len 131072`: does it fit, before anything is loaded?

Arithmetic only (`ic_model.sizing_serving`): no GPU, no vLLM and no weights are touched.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic_model.sizing import GIB, load_config, parameter_count
from ic_model.sizing_serving import (
    PAGE_TOKENS,
    ServerMemory,
    attention_shape,
    longest_context,
    prefill_budget_bytes,
    prefill_workspace_tokens,
    server_memory,
    stock_workspace_bytes,
)

if TYPE_CHECKING:
    from ic_model.configuration import ICConfig

# (--max-num-batched-tokens, --max-num-seqs), what serves many first; the first that fits is taken
PLANS = ((8192, 256), (4096, 128), (2048, 64), (2048, 16), (1024, 8), (512, 4))
UTILISATION = 0.9
# for what vLLM's own attention would take: multiprocessors of an RTX 2070 Super
SMALL_CARD_PROCESSORS = 40
FITS, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2
NAMES = {
    "weights": "weights",
    "absorbed": "kv_b_proj once more, absorbed",
    "kv_cache": "KV cache of one sequence",
    "prefill": "prefill, expanded keys and values",
    "activations": "activations of a step",
    "logits": "logits and sampling",
    "graphs": "CUDA graphs (allowance)",
    "runtime": "CUDA context and libraries (allowance)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a server would be started, and what it would take.

    Args:
        fits: whether it does.
        usable_bytes: what vLLM may use of each GPU.
        memory: by what takes it.
        max_model_len, step_tokens, sequences, kv_dtype: the flags' values.
        full_sequences: sequences of full length that the rest of the memory holds, the first included.
        longest_tokens: the longest context that would fit with these flags.
        stock_bytes: what vLLM's own MLA attention would set aside where ours takes `memory.prefill`.
    """

    fits: bool
    usable_bytes: int
    memory: ServerMemory
    max_model_len: int
    step_tokens: int
    sequences: int
    kv_dtype: str
    full_sequences: int
    longest_tokens: int
    stock_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 where it fits, 1 where it does not, 2 with one line on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.model)
        plan = choose_plan(config, options)
    except (ValueError, OSError) as error:
        parser.exit(BAD_INPUT, f"ic-vllm-plugin check: {error}\n")
    if options.json:
        report = {**asdict(plan), "flags": flags(options, plan)}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(_text(config, options, plan) + "\n")
    return FITS if plan.fits else DOES_NOT_FIT


def choose_plan(config: ICConfig, options: argparse.Namespace) -> Plan:
    """The first of `PLANS` that fits with what the user set; the smallest where none does.

    Args:
        config: of the model.
        options: of the command line.

    Raises:
        ValueError: names the option, its value and what is accepted.
    """
    _check_numbers(options)
    usable = options.gpu_memory_gib * GIB * options.gpu_memory_utilization
    # in the dtype of an own cache, then in fp8 where that was left open
    kv_dtypes = {"auto": ("bf16",), "fp8": ("fp8",), None: ("bf16", "fp8")}[options.kv_cache_dtype]
    plans = [
        _plan(config, options, usable, kv_dtype, step_tokens, sequences)
        for kv_dtype in kv_dtypes
        for step_tokens, sequences in PLANS
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _plan(
    config: ICConfig,
    options: argparse.Namespace,
    usable: float,
    kv_dtype: str,
    step_tokens: int,
    sequences: int,
) -> Plan:
    step_tokens = options.max_num_batched_tokens or step_tokens
    sequences = options.max_num_seqs or sequences
    context = options.max_model_len or config.max_position_embeddings
    server: dict[str, Any] = {
        "step_tokens": step_tokens,
        "sequences": sequences,
        "weight_bytes": _weight_bytes(config, options.model),
        "gpus": options.tensor_parallel_size,
        "graphs": not options.enforce_eager,
    }
    memory = server_memory(config, usable_bytes=usable, context_tokens=context, kv_dtype=kv_dtype, **server)
    pages = -(-context // PAGE_TOKENS)
    page_bytes = memory.kv_cache // (pages + 1)
    free_pages = (usable - (memory.total - memory.kv_cache)) // page_bytes - 1
    stock = stock_workspace_bytes(
        attention_shape(config, options.tensor_parallel_size),
        context_tokens=context,
        sequences=sequences,
        multiprocessors=SMALL_CARD_PROCESSORS,
    )
    return Plan(
        fits=memory.total <= usable,
        usable_bytes=int(usable),
        memory=memory,
        max_model_len=context,
        step_tokens=step_tokens,
        sequences=sequences,
        kv_dtype=kv_dtype,
        full_sequences=max(0, int(free_pages // pages)),
        longest_tokens=longest_context(config, usable_bytes=usable, kv_dtype=kv_dtype, **server),
        stock_bytes=sum(stock.values()),
    )


def flags(options: argparse.Namespace, plan: Plan) -> list[str]:
    """Arguments of `vllm serve` behind the model."""
    found = ["--max-model-len", str(plan.max_model_len)]
    found += ["--max-num-batched-tokens", str(plan.step_tokens), "--max-num-seqs", str(plan.sequences)]
    found += ["--gpu-memory-utilization", f"{options.gpu_memory_utilization:g}"]
    if plan.kv_dtype == "fp8":
        found += ["--kv-cache-dtype", "fp8"]
    if options.tensor_parallel_size > 1:
        found += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if options.enforce_eager:
        found.append("--enforce-eager")
    return found


def _weight_bytes(config: ICConfig, model: str) -> int:
    """What the weights take once loaded: the files' size, halved where vLLM halves the numbers."""
    stored = (
        sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    )
    if not stored:
        return 2 * parameter_count(config)
    return stored // 2 if "float32" in str(config.dtype) else stored


def _check_numbers(options: argparse.Namespace) -> None:
    if not 0 < options.gpu_memory_gib < float("inf"):
        raise ValueError(f"--gpu-memory-gib is {options.gpu_memory_gib}; accepted: numbers above 0")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization is {options.gpu_memory_utilization}; accepted: above 0, up to 1"
        )
    for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted: numbers from 1 on")


def _text(config: ICConfig, options: argparse.Namespace, plan: Plan) -> str:
    usable, total = plan.usable_bytes / GIB, plan.memory.total / GIB
    shape = attention_shape(config, options.tensor_parallel_size)
    rows = prefill_workspace_tokens(shape, prefill_budget_bytes(plan.usable_bytes))
    each = " on each GPU" if options.tensor_parallel_size > 1 else ""
    lines = [f"{options.model}, {plan.max_model_len:,} tokens of context, cache in {plan.kv_dtype}{each}", ""]
    lines += [f"  {NAMES[name]:<40}{value / GIB:8.2f} GiB" for name, value in asdict(plan.memory).items()]
    lines += [
        f"  {'sum':<40}{total:8.2f} GiB",
        f"  {options.gpu_memory_gib:g} GiB x {options.gpu_memory_utilization:g}".ljust(42)
        + f"{usable:8.2f} GiB",
        "",
        f"Prefill expands {rows:,} cached tokens at a time.",
        f"vLLM's own attention would set aside {plan.stock_bytes / GIB:.2f} GiB there.",
        "",
    ]
    if plan.fits:
        served = options.model if Path(options.model).is_dir() else "MODEL"
        lines += [
            f"It fits, {usable - total:.2f} GiB are left.",
            f"Sequences of this length that fit together: {plan.full_sequences}",
            f"Longest context with these flags: {plan.longest_tokens:,} tokens",
            "",
            f"  vllm serve {served} {' '.join(flags(options, plan))}",
        ]
    else:
        lines += [f"It does not fit: {total - usable:.2f} GiB too much. {_remedy(options, plan)}"]
    return "\n".join(lines)


def _remedy(options: argparse.Namespace, plan: Plan) -> str:
    remedies = []
    if plan.longest_tokens:
        remedies.append(f"--max-model-len of at most {plan.longest_tokens}")
    if plan.kv_dtype != "fp8":
        remedies.append("--kv-cache-dtype fp8")
    if (plan.step_tokens, plan.sequences) > PLANS[-1]:
        remedies.append("a lower --max-num-batched-tokens or --max-num-seqs")
    remedies.append("a checkpoint with quantised weights, or more GPUs (--tensor-parallel-size)")
    return f"What helps: {'; '.join(remedies)}."


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ic-vllm-plugin", description="InfiniteContext for vLLM.")
    check = top.add_subparsers(dest="command", required=True).add_parser(
        "check",
        help="whether a model fits a GPU, what takes how much, and with which flags",
        description="Say, before anything is loaded, whether a server fits a GPU. Exit status: 0 if it does, 1 if "
        "not, 2 for a wrong argument.",
    )
    check.add_argument("model", help="preset or checkpoint folder")
    check.add_argument("--gpu-memory-gib", type=float, required=True, help="memory of one GPU")
    check.add_argument("--max-model-len", type=int, metavar="TOKENS", help="default: the model's longest")
    check.add_argument(
        "--gpu-memory-utilization", type=float, default=UTILISATION, help="default: %(default)s"
    )
    check.add_argument(
        "--max-num-batched-tokens", type=int, metavar="TOKENS", help="default: the most that fits"
    )
    check.add_argument("--max-num-seqs", type=int, metavar="SEQUENCES", help="default: the most that fits")
    check.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        help="auto: the model's own. Default: auto, and fp8 only where that does not fit",
    )
    check.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs; default: %(default)s")
    check.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    check.add_argument("--json", action="store_true", help="print JSON")
    return top


if __name__ == "__main__":
    sys.exit(main())
