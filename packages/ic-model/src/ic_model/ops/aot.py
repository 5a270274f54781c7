"""Compile kernels ahead of time for every supported chip, without a GPU, and hold them to the chip's limits.

A kernel that takes too much shared memory fails only when it is launched, on the machine of a user; here it
fails on any CPU. `python -m ic_model.ops.aot` prints what every op's kernels need on every chip. What would be
launched stands in each op's own `aot.py`: `variants(capability)` returns a list of `AotVariant`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ic_model.ops.aot_barriers import idle_barriers

# shared memory that one block can get, with what the driver keeps for itself taken off: CUDA C++ programming
# guide, technical specifications per compute capability (64, 163, 99 and 227 KiB)
SHARED_LIMIT_BYTES = {75: 65_536, 80: 166_912, 89: 101_376, 90: 232_448}
CHIPS = tuple(SHARED_LIMIT_BYTES)

# pointers of PyTorch's allocator, and what Triton's launcher finds out about strides
DIVISIBILITY = 16

_WGMMA = re.compile(r"wgmma\.mma_async(?:\.sp)?\.sync\.aligned\.(m\d+n\d+k\d+)")
_MMA_SYNC = re.compile(r"\bmma\.sync\.aligned\.(m\d+n\d+k\d+)")
_CP_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class AotVariant:
    """One kernel as one chip would launch it.

    Args:
        name: short, unique among the op's variants for a chip.
        function: what `@triton.jit` or `@gluon.jit` returned.
        signature: argument to Triton type, such as "*bf16", "fp32", "i32", "i64"; constants may be left out.
        constants: `tl.constexpr` arguments, pointers that are None, and strides that are 1.
        num_warps: of a block.
        num_stages: of the software pipeline.
        attributes: argument to the power of two that divides it. Pointers and arguments with "stride" in
            their name have 16 unless it says 1, which claims nothing.
        max_spill_bytes: registers that may go to local memory.
        mma: what every matrix multiplication must be, such as "wgmma" or "mma.sync m16n8k16"; None for any.
        options: further options of Triton's compiler, such as `maxnreg`.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    attributes: Mapping[str, int] = field(default_factory=dict)
    max_spill_bytes: int = 0
    mma: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """Name of the op's folder, from the module that the kernel is written in."""
        parts = self.function.__module__.split(".")
        return parts[parts.index("ops") + 1] if "ops" in parts[:-1] else parts[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class AotReport:
    """What a variant needs on a chip; `mma` lists the instructions, "fma" where there is none."""

    op: str
    variant: str
    capability: int
    triton: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    shared_limit_bytes: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    mma: str
    cp_async: bool
    tma: bool
    compile_s: float


class AotError(RuntimeError):
    """A variant does not compile, or needs more than the chip has or the variant allows.

    `report` is what it needs; None where it does not compile.
    """

    def __init__(self, message: str, report: AotReport | None = None) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return self.args[0]


def compile_variant(variant: AotVariant, capability: int) -> AotReport:
    """Compile a variant for a chip down to machine code, and check what it needs. No GPU is needed.

    Args:
        variant: what would be launched.
        capability: the chip's compute capability as one number, one of `CHIPS`.

    Raises:
        ValueError: the capability is none of `CHIPS`, or the variant's arguments are not the function's.
        AotError: it does not compile, or its shared memory, spills or matrix instructions are not as they must
            be: names op, variant and chip, what it needs and the limit.
    """
    if capability not in SHARED_LIMIT_BYTES:
        raise ValueError(f"capability is {capability}; accepted: {', '.join(map(str, CHIPS))}")
    arguments = _arguments(variant)
    where = f"{variant.op}, {variant.name}, sm{capability}"
    start = time.perf_counter()
    try:
        kernel, log = _compile(variant, arguments, capability)
    except Exception as error:
        raise AotError(f"{where} does not compile: {type(error).__name__}: {error}") from error
    report = _report(variant, capability, kernel, log, time.perf_counter() - start)
    wrong = [*_violations(variant, report), *idle_barriers(kernel.asm.get("ttgir", ""))]
    if wrong:
        raise AotError(f"{where} (Triton {report.triton}): {'; '.join(wrong)}", report)
    return report


def ops_with_kernels() -> list[str]:
    """Names of the ops that have an `aot.py`."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/aot.py"))


def op_variants(op: str, capability: int) -> list[AotVariant]:
    """What an op would launch on a chip, from its `aot.py`.

    Args:
        op: one of `ops_with_kernels`.
        capability: one of `CHIPS`.

    Raises:
        ValueError: there are no variants, or two of one name.
    """
    variants = import_module(f"ic_model.ops.{op}.aot").variants(capability)
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{op}: variants({capability}) has the names {names}; at least one, each once")
    return variants


def compile_all(
    pairs: Sequence[tuple[str, int]], *, progress: Callable[[str], None] | None = None
) -> dict[tuple[str, int], list[AotReport | AotError]]:
    """Compile all variants of several ops and chips, in as many processes as there are CPUs.

    Args:
        pairs: (op, capability).
        progress: called with a line after each variant.

    Returns:
        for each pair, in the order of its variants, a report or the error that compiling raised.
    """
    jobs = [(*pair, index) for pair in pairs for index in range(len(op_variants(*pair)))]
    found: dict[tuple[str, int], dict[int, AotReport | AotError]] = {pair: {} for pair in pairs}
    workers = min(len(os.sched_getaffinity(0)), max(len(jobs), 1))
    # not forked: PyTorch's threads do not survive that
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[AotReport], tuple[str, int, int]] = {
            pool.submit(_job, *job): job for job in jobs
        }
        for done, future in enumerate(as_completed(futures), 1):
            op, capability, index = futures[future]
            try:
                found[op, capability][index] = future.result()
            except AotError as error:
                found[op, capability][index] = error
            if progress:
                progress(f"[{done}/{len(jobs)}] {_line(op, capability, found[op, capability][index])}")
    return {pair: [results[index] for index in sorted(results)] for pair, results in found.items()}


def rows(results: Mapping[tuple[str, int], Sequence[AotReport | AotError]]) -> list[dict[str, Any]]:
    """Flat rows of reports, an error's with its text in `error`.

    Args:
        results: from `compile_all`.
    """
    flat: list[dict[str, Any]] = []
    for (op, capability), reports in results.items():
        for report in reports:
            needs = report.report if isinstance(report, AotError) else report
            row = {} if needs is None else asdict(needs)
            error = str(report) if isinstance(report, AotError) else None
            flat.append(row | {"op": op, "capability": capability, "error": error})
    return flat


def table(flat: Sequence[Mapping[str, Any]]) -> str:
    """A table of chips and ops in Markdown, sizes in bytes, errors below it.

    Args:
        flat: from `rows`.
    """
    lines = [
        "| chip | op | variant | warps, stages | shared | limit | registers | spills | matrix unit | copies |",
        "|---|---|---|---|---:|---:|---:|---:|---|---|",
    ]
    for row in sorted(flat, key=lambda row: (row["capability"], row["op"])):
        if "variant" not in row:
            lines.append(f"| sm{row['capability']} | {row['op']} | does not compile | | | | | | | |")
            continue
        copies = [name for name, used in (("cp.async", row["cp_async"]), ("TMA", row["tma"])) if used]
        lines.append(
            f"| sm{row['capability']} | {row['op']} | {row['variant']} | {row['num_warps']}, {row['num_stages']} "
            f"| {row['shared_bytes']:,} | {row['shared_limit_bytes']:,} | {row['registers']} "
            f"| {row['spill_bytes']} | {row['mma']} | {' '.join(copies) or 'plain'} |"
        )
    errors = [f"error: {row['error']}" for row in flat if row["error"]]
    return "\n".join([*lines, *([""] if errors else []), *errors])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of ops and chips to a command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--op", nargs="+", default=ops_with_kernels(), choices=ops_with_kernels(), metavar="OP"
    )
    parser.add_argument("--capability", nargs="+", type=int, default=CHIPS, choices=CHIPS, metavar="N")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where something does not compile or fit."""
    parser = argparse.ArgumentParser(
        prog="python -m ic_model.ops.aot", description="What the kernels need on every chip, without a GPU."
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    pairs = [(op, capability) for capability in options.capability for op in options.op]
    flat = rows(compile_all(pairs, progress=lambda line: print(line, file=sys.stderr)))
    print(table(flat))
    return int(any(row["error"] for row in flat))


def _arguments(variant: AotVariant) -> dict[str, str]:
    """The signature of all arguments in the function's order, constants as "constexpr"."""
    function = variant.function
    if not hasattr(function, "cache_key"):
        raise ValueError(
            f"function of {variant.name} is a {type(function).__name__}; it must be what triton.jit or gluon.jit "
            "returns, without TRITON_INTERPRET"
        )
    names = list(function.arg_names)
    defaults = {parameter.name for parameter in function.params if parameter.has_default}
    given = {*variant.signature, *variant.constants}
    if given - set(names) or set(names) - given - defaults or set(variant.attributes) - set(names):
        raise ValueError(
            f"{variant.op}, {variant.name}: the arguments are {', '.join(names)}; unknown: "
            f"{sorted((given | set(variant.attributes)) - set(names))}, missing: "
            f"{sorted(set(names) - given - defaults)}"
        )
    return {
        name: "constexpr" if name in variant.constants else variant.signature.get(name, "constexpr")
        for name in names
    }


def _compile(variant: AotVariant, arguments: Mapping[str, str], capability: int) -> tuple[Any, str]:
    """Triton's compiled kernel, and what its assembler said."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = variant.function
    constants = {
        parameter.name: variant.constants.get(parameter.name, parameter.default)
        for parameter in function.params
        if arguments[parameter.name] == "constexpr"
    }
    divisors = {
        name: variant.attributes.get(name, DIVISIBILITY if kind[0] == "*" or "stride" in name else 1)
        for name, kind in arguments.items()
        if kind != "constexpr"
    }
    attributes = {
        (function.arg_names.index(name),): [["tt.divisibility", divisor]]
        for name, divisor in divisors.items()
        if divisor > 1
    }
    source = (GluonASTSource if function.is_gluon() else ASTSource)(
        function, dict(arguments), constants, attributes
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        # what is the default up to Triton 3.9, and will not be after it
        "enable_fp_fusion": True,
        **variant.options,
    }
    # the assembler speaks only when it runs, hence the empty cache
    with (
        tempfile.TemporaryDirectory(prefix="ic-aot-") as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(io.StringIO()) as log,
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel, log.getvalue()


def _report(variant: AotVariant, capability: int, kernel: Any, log: str, compile_s: float) -> AotReport:
    ptx = kernel.asm["ptx"]
    registers = [int(number) for number in _REGISTERS.findall(log)]
    frames = [(int(stack), int(stores)) for stack, stores, _ in _STACK.findall(log)]
    assert registers and frames, f"the assembler reports no registers: {log!r}"
    kinds = [
        f"{name} {shape}"
        for name, pattern in (("wgmma", _WGMMA), ("mma.sync", _MMA_SYNC))
        for shape in sorted(set(pattern.findall(ptx)))
    ]
    return AotReport(
        op=variant.op,
        variant=variant.name,
        capability=capability,
        triton=_triton_version(),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        shared_bytes=kernel.metadata.shared,
        shared_limit_bytes=SHARED_LIMIT_BYTES[capability],
        registers=max(registers),
        stack_bytes=max(stack for stack, _ in frames),
        spill_bytes=sum(stores for _, stores in frames),
        mma=" + ".join(kinds) or "fma",
        cp_async=_CP_ASYNC.search(ptx) is not None,
        tma="cp.async.bulk" in ptx,
        compile_s=round(compile_s, 2),
    )


def _violations(variant: AotVariant, report: AotReport) -> Iterator[str]:
    if report.shared_bytes > report.shared_limit_bytes:
        yield f"shared memory is {report.shared_bytes} bytes, the chip's limit {report.shared_limit_bytes}"
    if report.spill_bytes > variant.max_spill_bytes:
        yield f"spills are {report.spill_bytes} bytes, max_spill_bytes is {variant.max_spill_bytes}"
    if variant.mma is not None:
        other = [kind for kind in report.mma.split(" + ") if not f"{kind} ".startswith(f"{variant.mma} ")]
        if other:
            yield f"matrix unit is {report.mma}, mma asks for {variant.mma}"


def _line(op: str, capability: int, result: AotReport | AotError) -> str:
    if isinstance(result, AotError):
        return str(result).splitlines()[0]
    return f"{op}, {result.variant}, sm{capability}: {result.compile_s:.1f} s"


def _job(op: str, capability: int, index: int) -> AotReport:
    return compile_variant(_cached_variants(op, capability)[index], capability)


@lru_cache(maxsize=64)
def _cached_variants(op: str, capability: int) -> list[AotVariant]:
    return op_variants(op, capability)


def _triton_version() -> str:
    import triton

    return triton.__version__


if __name__ == "__main__":
    # by its name: the classes here are not those that the ops' own aot.py import
    sys.exit(import_module("ic_model.ops.aot").main())
