"""The backend on a GPU: kernels instead of references, CUDA graphs, and vLLM's own cache write.

python -m pytest packages/ic-vllm-plugin/tests/gpu -m gpu
"""

import pytest
import torch
from latent_batches import Batch, Dims, make_builder

from ic_vllm_plugin import compat

pytestmark = pytest.mark.gpu

# of ic-1b, of DeepSeek-V2-Lite, and of converted models
ROW_320, ROW_576 = Dims(256, 64, 128, 128, 32), Dims(512, 64, 128, 128, 16)
OTHER_ROWS = [Dims(192, 64, 64, 64, 9), Dims(448, 64, 128, 128, 8), Dims(256, 32, 64, 64, 8)]
PAGE_TOKENS = 64
BATCHES = {
    "decode": [(1, 1), (1, 3000), (1, 64), (1, 65)],
    "drafts": [(4, 40), (4, 4), (4, 1333)],
    "some without drafts": [(1, 40), (3, 77), (4, 1333)],
    "prefill": [(500, 500), (17, 17)],
    "mixed": [(1, 5), (1, 3333), (333, 4433), (16, 32), (50, 50)],
}
DRAFTS = 3
# 8 bits of the query, absorbed and not, of the softmax weights, of what they sum and of the result; 11 in float16
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}


def half() -> torch.dtype:
    """What the device's tensor cores take."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def batch_on_gpu(monkeypatch, dims, requests, kv_dtype="auto", dtype=None, **options) -> Batch:
    found = Batch(
        dims,
        requests,
        dtype or half(),
        kv_dtype,
        device="cuda",
        page_tokens=PAGE_TOKENS,
        options=options,
    )
    return found.prepare(monkeypatch)


def builder_on_gpu(dims, **options):
    return make_builder(dims, drafts=DRAFTS, page_tokens=PAGE_TOKENS, device="cuda", **options)


def assert_close(output: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert not output.isnan().any()
    error = (output.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[dtype], f"{error:.1e}"


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize(
    "dims", [ROW_320, ROW_576, *OTHER_ROWS], ids=lambda dims: f"row {dims.latent + dims.rope}"
)
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_output_equals_plain_attention(monkeypatch, requests, dims, kv_dtype):
    batch = batch_on_gpu(monkeypatch, dims, requests, kv_dtype)
    metadata = builder_on_gpu(dims, workspace_tokens=1000).build(0, batch.common())
    assert_close(batch.run(metadata), batch.expected(metadata.num_decodes), batch.dtype)


def test_float32_is_computed_in_float32(monkeypatch):
    batch = batch_on_gpu(monkeypatch, Dims(256, 64, 128, 128, 4), BATCHES["mixed"], dtype=torch.float32)
    metadata = builder_on_gpu(batch.dims).build(0, batch.common())
    assert_close(batch.run(metadata), batch.expected(metadata.num_decodes), torch.float32)


@pytest.mark.parametrize("tokens", (1, 1 + DRAFTS))
@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
def test_a_captured_decode_step_is_replayed_with_other_lengths_pages_and_rows(monkeypatch, kv_dtype, tokens):
    requests = [(tokens, 3000), (tokens, 64), (tokens, 700)]
    batch = batch_on_gpu(monkeypatch, ROW_320, requests, kv_dtype)
    common = batch.common()
    metadata = builder_on_gpu(ROW_320).build_for_cudagraph_capture(common)
    query = torch.randn(3 * tokens, ROW_320.heads, 320, device="cuda", dtype=batch.dtype)
    cache = batch.cache.view(torch.float8_e4m3fn) if kv_dtype == "fp8" else batch.cache
    batch.run(metadata)
    run = lambda: batch.impl.forward_mqa(query, cache, metadata, batch.layer)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    # another step in the same buffers: shorter, permuted, one request gone
    common.seq_lens.copy_(torch.tensor([64, 700, 0], dtype=torch.int32))
    common.block_table_tensor.copy_(common.block_table_tensor[[1, 2, 0]])
    query.normal_()
    graph.replay()
    expected, expected_lse = run()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    assert not out[2 * tokens :].any() and out[: 2 * tokens].any()


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
def test_short_questions_run_absorbed(monkeypatch, kv_dtype):
    batch = batch_on_gpu(monkeypatch, ROW_320, [(1, 3000), (1, 7), (50, 2050), (9, 700)], kv_dtype)
    metadata = builder_on_gpu(ROW_320, absorbed_tokens=64).build(0, batch.common())
    assert not metadata.num_prefills
    assert_close(batch.run(metadata), batch.expected(metadata.num_decodes), batch.dtype)


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
def test_every_kernel_runs_before_the_first_request(monkeypatch, kv_dtype):
    batch = batch_on_gpu(monkeypatch, ROW_320, BATCHES["decode"], kv_dtype)
    batch.impl.warm_up(torch.device("cuda"), page_tokens=PAGE_TOKENS, query_tokens=[1, 1 + DRAFTS, 8, 64])


def test_kernels_for_turing_compute_the_same(monkeypatch):
    options = {"decode": "turing", "prefill": "torch"}
    for requests in BATCHES.values():
        batch = batch_on_gpu(monkeypatch, ROW_320, requests, dtype=torch.float16, **options)
        metadata = builder_on_gpu(ROW_320, workspace_tokens=1000).build(0, batch.common())
        assert_close(batch.run(metadata), batch.expected(metadata.num_decodes), torch.float16)


def check_prefill(monkeypatch, prefill: str) -> None:
    batch = batch_on_gpu(monkeypatch, ROW_320, BATCHES["mixed"], prefill=prefill)
    metadata = builder_on_gpu(ROW_320, workspace_tokens=1000).build(0, batch.common())
    assert_close(batch.run(metadata), batch.expected(metadata.num_decodes), batch.dtype)


def test_both_prefills_compute_the_same_and_flash_attention_is_for_hopper(monkeypatch):
    check_prefill(monkeypatch, "ops")
    if compat.compute_capability() == 90:
        check_prefill(monkeypatch, "flash_attn")
    else:
        with pytest.raises(ValueError, match="compute capability"):
            check_prefill(monkeypatch, "flash_attn")


def test_prefill_stays_within_what_the_profile_counts(monkeypatch):
    """The most that forward_mha allocates beside its arguments, on a long context, against the formula."""
    from ic_model.sizing_serving import AttentionShape, prefill_peak_bytes

    tokens, context, rows = 2048, 60_000, 4096
    batch = batch_on_gpu(monkeypatch, ROW_320, [(tokens, tokens + context)])
    metadata = builder_on_gpu(ROW_320, workspace_tokens=rows).build(0, batch.common())
    own = batch.rows[0][-tokens:]
    latents, rope = own.split([256, 64], dim=-1)
    output = batch.queries[0].new_empty(tokens, 32 * 128)

    def run() -> None:
        batch.impl.forward_mha(
            batch.queries[0], latents, rope.unsqueeze(1), batch.cache, metadata, batch.k_scale, output
        )

    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    shape = AttentionShape(
        heads=32, kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
    )
    counted = prefill_peak_bytes(shape, step_tokens=tokens, workspace_tokens=rows)
    assert taken <= counted, f"{taken / 2**20:.0f} MiB taken, {counted / 2**20:.0f} counted"
