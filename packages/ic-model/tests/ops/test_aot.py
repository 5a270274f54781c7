"""Every op's kernels compile for every chip, within its limits; and compiling ahead of time notices when not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ic_model.ops import aot
from ic_model.ops.aot import CHIPS, AotError, AotReport, AotVariant, compile_all, compile_variant

# everything is compiled once, before the first of them
pytestmark = [pytest.mark.aot, pytest.mark.timeout(1800)]


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, stride_x, columns, BLOCK: tl.constexpr, SCALE: tl.constexpr = 2.0):
    rows = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * stride_x + lanes[None], mask=lanes[None] < columns, other=0.0)
        y = tl.load(y_ptr + lanes[:, None] * BLOCK + rows[None], mask=lanes[:, None] < columns, other=0.0)
        total = tl.dot(x, y, total)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None], total * SCALE)


@gluon.jit
def double_kernel(x_ptr, out_ptr, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, BLOCK, layout=layout)
    gl.store(out_ptr + offsets, gl.load(x_ptr + offsets) * 2)


@gluon.jit
def barriers_kernel(x_ptr, out_ptr, BLOCK: gl.constexpr, WAITED: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(barriers.index(i), count=1)
    if WAITED:
        mbarrier.arrive(barriers.index(0), count=1)
        mbarrier.wait(barriers.index(0), 0)
    double_kernel(x_ptr, out_ptr, BLOCK)


PRODUCT = AotVariant(
    name="product",
    function=product_kernel,
    signature={"x_ptr": "*fp16", "y_ptr": "*fp16", "out_ptr": "*fp32", "stride_x": "i64", "columns": "i32"},
    constants={"BLOCK": 64},
    num_warps=4,
    num_stages=3,
)
DOUBLE = AotVariant(
    name="double",
    function=double_kernel,
    signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
    constants={"BLOCK": 256},
)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, int], list[AotReport | AotError]]:
    """All ops and chips that the chosen tests ask for, compiled at once: one after another takes minutes."""
    chosen = (getattr(item, "callspec", None) for item in request.session.items)
    pairs = {(spec.params["op"], spec.params["chip"]) for spec in chosen if spec and "op" in spec.params}
    return compile_all(sorted(pairs))


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm{chip}")
@pytest.mark.parametrize("op", aot.ops_with_kernels())
def test_op_compiles_within_limits(op, chip, compiled):
    reports = compiled[op, chip]
    errors = [str(report) for report in reports if isinstance(report, AotError)]
    assert reports
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)


@pytest.mark.parametrize(
    ("chip", "block", "mma", "cp_async"),
    [
        (75, 32, "fma", False),
        (80, 64, "mma.sync m16n8k16", True),
        (89, 64, "mma.sync m16n8k16", True),
        (90, 64, "wgmma m64n64k16", True),
    ],
)
def test_report_of_a_product(chip, block, mma, cp_async):
    report = compile_variant(replace(PRODUCT, constants={"BLOCK": block}, mma=mma), chip)
    assert (report.mma, report.cp_async, report.tma) == (mma, cp_async, False)
    assert 0 < report.shared_bytes <= report.shared_limit_bytes == aot.SHARED_LIMIT_BYTES[chip]
    assert 32 <= report.registers <= 255 and report.spill_bytes == 0
    assert (report.op, report.variant, report.triton) == ("test_aot", "product", triton.__version__)


def test_gluon_compiles():
    report = compile_variant(DOUBLE, 75)
    assert report.shared_bytes == 0 and report.mma == "fma" and not report.cp_async


def test_pointers_and_strides_count_as_aligned():
    aligned = compile_variant(PRODUCT, 80)
    unaligned = compile_variant(replace(PRODUCT, attributes={"stride_x": 1, "x_ptr": 1, "y_ptr": 1}), 80)
    assert aligned.cp_async and not unaligned.cp_async


def test_too_much_shared_memory_is_an_error():
    with pytest.raises(AotError, match="limit") as caught:
        compile_variant(replace(PRODUCT, constants={"BLOCK": 128}, num_stages=8, num_warps=8), 89)
    report = caught.value.report
    assert report is not None and report.shared_bytes > 101_376
    message = (
        f"test_aot, product, sm89 (Triton {triton.__version__}): shared memory is {report.shared_bytes} "
    )
    assert str(caught.value) == message + "bytes, the chip's limit 101376"


def test_spills_are_an_error_unless_allowed():
    cramped = replace(PRODUCT, options={"maxnreg": 32})
    with pytest.raises(AotError, match=r"spills are \d+ bytes, max_spill_bytes is 0") as caught:
        compile_variant(cramped, 80)
    assert caught.value.report is not None
    spills = caught.value.report.spill_bytes
    assert compile_variant(replace(cramped, max_spill_bytes=spills), 80).spill_bytes == spills > 0


def test_another_matrix_unit_is_an_error():
    assert compile_variant(replace(PRODUCT, mma="mma.sync"), 80).mma == "mma.sync m16n8k16"
    with pytest.raises(AotError, match=r"matrix unit is mma\.sync m16n8k16, mma asks for wgmma"):
        compile_variant(replace(PRODUCT, mma="wgmma"), 80)


def test_a_barrier_that_nothing_waits_for_is_an_error():
    waited = replace(DOUBLE, function=barriers_kernel, constants={"BLOCK": 256, "WAITED": True})
    compile_variant(waited, 90)
    with pytest.raises(AotError, match=r"barrier %barriers\w* is initialised and not used"):
        compile_variant(replace(waited, constants={"BLOCK": 256, "WAITED": False}), 90)


def test_what_does_not_compile_is_an_error():
    wrong = replace(PRODUCT, constants={"BLOCK": 63})
    with pytest.raises(AotError, match="test_aot, product, sm80 does not compile: CompilationError"):
        compile_variant(wrong, 80)


def test_callers_mistakes():
    with pytest.raises(ValueError, match="capability is 70; accepted: 75, 80, 89, 90"):
        compile_variant(PRODUCT, 70)
    with pytest.raises(ValueError, match=r"product: .*unknown: \['BLOCKS'\], missing: \['BLOCK'\]"):
        compile_variant(replace(PRODUCT, constants={"BLOCKS": 64}), 80)
    with pytest.raises(ValueError, match=r"function of product is a function; it must be what triton\.jit"):
        compile_variant(replace(PRODUCT, function=product_kernel.fn), 80)


def test_table_has_errors_below_it():
    report = compile_variant(DOUBLE, 80)
    results = {
        ("a", 80): [report],
        ("b", 80): [AotError("b, x, sm80 is too large", report), AotError("none")],
    }
    flat = aot.rows(results)
    lines = aot.table(flat).splitlines()
    assert lines[2].startswith("| sm80 | a | double | 4, 2 | 0 | 166,912 |")
    assert lines[3].startswith("| sm80 | b | double")
    assert lines[4] == "| sm80 | b | does not compile | | | | | | | |"
    assert lines[-2:] == ["error: b, x, sm80 is too large", "error: none"]
    assert [row["error"] for row in flat] == [None, "b, x, sm80 is too large", "none"]
