"""The GPU backend's classes against plain attention, on the CPU, where the operations run as their references."""

import pytest
import torch
from latent_batches import FP8_SCALE, PAGE_TOKENS, Batch, Dims, engine_config, make_builder, make_impl
from vllm.v1.attention.backend import AttentionCGSupport

from ic_vllm_plugin.attention import LatentBackend
from ic_vllm_plugin.metadata import LatentMetadataBuilder
from ic_vllm_plugin.prefill import gather_rows, locate_context, plan_context

ROW_320, ROW_576 = Dims(256, 64, 128, 128, 4), Dims(512, 64, 128, 128, 2)
# what converted models have, and vLLM's own metadata and gather refuse
OTHER_ROWS = [Dims(192, 64, 64, 64, 3), Dims(448, 64, 128, 128, 2), Dims(64, 32, 32, 48, 1)]
# (query tokens, cached tokens with these), short queries first, as the model runner orders them
BATCHES = {
    "decode": [(1, 1), (1, 300), (1, 16)],
    "prefill": [(50, 50), (17, 17)],
    "context": [(33, 777), (20, 128), (2, 34)],
    "mixed": [(1, 5), (1, 333), (33, 433), (16, 32), (50, 50)],
}
DRAFTED = {
    "as many drafts each": [(4, 40), (4, 4), (4, 333)],
    "some without drafts": [(1, 40), (3, 77), (4, 333), (1, 1)],
    "drafts and prefill": [(4, 40), (2, 77), (60, 100)],
    "a question behind a cached document": [(4, 90), (9, 409)],
}
# float32 accumulates a few hundred terms; bfloat16 keeps 8 bits of queries, keys, values and sums, and rounds the
# absorbed query and the latent sum once more
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}


def check(batch: Batch, *, drafts: int = 0) -> None:
    metadata = make_builder(batch.dims, drafts=drafts).build(0, batch.common())
    output, expected = batch.run(metadata).float(), batch.expected(metadata.num_decodes)
    assert not output.isnan().any()
    bound = TOLERANCE[batch.dtype]
    assert (output - expected).norm() / expected.norm() < bound
    assert (output - expected).abs().max() < 20 * bound


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize(
    "dims", [ROW_320, ROW_576, *OTHER_ROWS], ids=lambda dims: f"row {dims.latent + dims.rope}"
)
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_output_equals_plain_attention(monkeypatch, requests, dims, kv_dtype):
    check(Batch(dims, requests, torch.float32, kv_dtype).prepare(monkeypatch))


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize("dims", [ROW_320, ROW_576], ids=lambda dims: f"row {dims.latent + dims.rope}")
def test_output_equals_plain_attention_in_bfloat16(monkeypatch, dims, kv_dtype):
    check(Batch(dims, BATCHES["mixed"], torch.bfloat16, kv_dtype).prepare(monkeypatch))


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize("requests", DRAFTED.values(), ids=DRAFTED)
def test_several_query_tokens_of_a_request_equal_plain_attention(monkeypatch, requests, kv_dtype):
    check(Batch(ROW_320, requests, torch.float32, kv_dtype).prepare(monkeypatch), drafts=3)


@pytest.mark.parametrize("workspace_tokens", (1, 7, 64, 10_000))
def test_the_workspaces_size_changes_nothing(monkeypatch, workspace_tokens):
    batch = Batch(ROW_320, [(3, 3 + 61), (30, 95), (5, 5)], torch.float32).prepare(monkeypatch)
    metadata = make_builder(ROW_320, workspace_tokens=workspace_tokens).build(0, batch.common())
    expected = batch.expected(0)
    assert (batch.run(metadata) - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_context_expands_the_same_where_the_projection_is_no_plain_matrix(monkeypatch, dtype):
    batch = Batch(ROW_320, BATCHES["context"], dtype).prepare(monkeypatch)
    rows = torch.randn(70, 320).to(dtype)
    keys, values = batch.impl._expander(rows)(rows)
    batch.impl.kv_b_proj.quant_method = None
    expected_keys, expected_values = batch.impl._expander(rows)(rows)
    assert torch.equal(keys[..., 128:], rows[:, None, 256:].expand(-1, 4, -1)), "rotated keys are copied"
    for left, right in ((keys, expected_keys), (values, expected_values)):
        assert (left - right).norm() / right.norm() < TOLERANCE[dtype]
    check(batch)


@pytest.mark.parametrize("kv_dtype", (torch.bfloat16, torch.float8_e4m3fn), ids=str)
def test_context_is_gathered_from_a_cache_of_its_own_and_from_a_shared_one(kv_dtype):
    cache = torch.randn(9, PAGE_TOKENS, 320).to(kv_dtype)
    table = torch.tensor([[4, 0, 8], [2, 7, 5]], dtype=torch.int32)
    passes = plan_context([40, 17], 64)
    context = locate_context(passes[0], [0, 3, 5], table, PAGE_TOKENS)
    expected = torch.cat(
        [cache.float()[pages].flatten(0, 1)[:n] for pages, n in zip(table.tolist(), (40, 17), strict=True)]
    )
    if kv_dtype == torch.float8_e4m3fn:
        expected = expected * FP8_SCALE
    shared = torch.stack((torch.zeros_like(cache.float()), cache.float()), dim=1).to(kv_dtype)[:, 1]
    for source in (cache, shared):
        rows = gather_rows(source, context, torch.bfloat16, torch.tensor(FP8_SCALE))
        assert torch.equal(rows, expected.bfloat16())


QUESTIONS = {
    "decode and questions": [(1, 40), (1, 7), (9, 300), (20, 77), (3, 50)],
    "questions only": [(20, 500), (32, 90)],
    "questions and prefill": [(1, 40), (9, 300), (60, 100)],
    "questions without context": [(1, 40), (9, 9), (1, 1)],
}


@pytest.mark.parametrize("drafts", (0, 3))
@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize("requests", QUESTIONS.values(), ids=QUESTIONS)
def test_short_questions_run_absorbed_where_that_is_asked_for(monkeypatch, requests, kv_dtype, drafts):
    batch = Batch(ROW_320, requests, torch.float32, kv_dtype).prepare(monkeypatch)
    builder = make_builder(ROW_320, drafts=drafts, absorbed_tokens=32)
    metadata = builder.build(0, batch.common())
    assert metadata.num_prefills == sum(queries > 32 for queries, _ in requests)
    output, expected = batch.run(metadata), batch.expected(metadata.num_decodes)
    assert not output.isnan().any()
    assert (output - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_the_kernel_is_launched_with_few_numbers_of_query_tokens(monkeypatch):
    assert make_builder(ROW_320)._launched_with() == [1]
    assert make_builder(ROW_320, drafts=3)._launched_with() == [1, 4]
    builder = make_builder(ROW_320, drafts=2, absorbed_tokens=50)
    assert builder._launched_with() == [1, 3, 8, 16, 32, 64]
    batch = Batch(ROW_320, [(1, 40), (2, 7), (9, 300), (20, 77)], torch.float32).prepare(monkeypatch)
    steps, questions = builder.build(0, batch.common()).decode
    assert (steps.query_tokens, questions.query_tokens) == (3, 32), "not the longest: each would be compiled"
    assert (steps.tokens, questions.tokens) == (slice(0, 3), slice(3, 32))


def test_decode_returns_the_log_sum_exp(monkeypatch):
    batch = Batch(ROW_320, DRAFTED["some without drafts"], torch.float32).prepare(monkeypatch)
    batch.run(make_builder(ROW_320, drafts=3).build(0, batch.common()))
    pairs = zip(batch.queries, batch.rows, strict=True)
    expected = torch.cat([batch.plain(query, rows)[1] for query, rows in pairs])
    torch.testing.assert_close(batch.lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", (1, 4))
def test_padding_of_a_cuda_graph_gets_zeros_and_nobodys_rows(monkeypatch, tokens):
    batch = Batch(ROW_320, [(tokens, 40), (tokens, 333)], torch.float32).prepare(monkeypatch)
    common = batch.common(padded_requests=2, padded_tokens=2 * tokens)
    metadata = make_builder(ROW_320, drafts=tokens - 1).build_for_cudagraph_capture(common)
    (decode,) = metadata.decode
    assert decode.rows is None and decode.query_tokens == tokens
    output = batch.run(metadata)
    expected = batch.expected(2)
    assert (output[: 2 * tokens] - expected).norm() / expected.norm() < TOLERANCE[torch.float32]
    assert not output[2 * tokens :].any()


def test_a_decode_steps_metadata_are_the_runners_buffers(monkeypatch):
    # what a graph was captured with is what it reads when it is replayed
    batch = Batch(ROW_320, BATCHES["decode"], torch.float32).prepare(monkeypatch)
    common = batch.common()
    (decode,) = make_builder(ROW_320).build(0, common).decode
    assert decode.seq_lens.data_ptr() == common.seq_lens.data_ptr()
    assert decode.block_table.data_ptr() == common.block_table_tensor.data_ptr()


def test_full_cuda_graphs_for_decode_with_drafts():
    assert LatentMetadataBuilder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert make_builder(ROW_320).reorder_batch_threshold == 1
    assert make_builder(ROW_320, drafts=3).reorder_batch_threshold == 4


def test_lengths_with_drafts_in_flight_are_the_devices(monkeypatch):
    # the host takes every draft for accepted; a context that long would read rows of nobody
    batch = Batch(ROW_320, [(60, 100)], torch.float32).prepare(monkeypatch)
    common = batch.common()
    common.seq_lens_cpu_upper_bound += 3
    metadata = make_builder(ROW_320, drafts=3).build(0, common)
    expected = batch.expected(0)
    assert (batch.run(metadata) - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_passes_fit_the_workspace_cover_the_context_once_and_have_no_gaps():
    passes = plan_context([250, 30, 0, 0, 90, 10], 100)
    assert [[(piece.request, piece.start, piece.tokens) for piece in one] for one in passes] == [
        [(0, 0, 100)],
        [(0, 100, 100)],
        [(0, 200, 50), (1, 0, 30)],
        [(4, 0, 90), (5, 0, 10)],
    ]
    assert plan_context([0, 0], 100) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype is 'fp8_e5m2'; accepted: auto, float16"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype is 'float16' and the model's dtype torch.float32"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap is 30.0"),
        ({"attn_type": "encoder"}, "attn_type is 'encoder'"),
        (
            {"v_head_dim": 100},
            "v_head_dim is 100; InfiniteContext's prefill accepts multiples of 16 up to 256",
        ),
        ({"qk_nope_head_dim": 256}, r"qk_nope_head_dim \+ qk_rope_head_dim is 320"),
    ],
)
def test_what_it_cannot_do_is_refused(monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        make_impl(monkeypatch, ROW_320, torch.float32, **options)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"decode": "fast"}, r"\['decode'\] is 'fast'; accepted: hopper"),
        (
            {"prefil": "torch"},
            r"has \['prefil'\]; accepted: decode, prefill, prefill_workspace_mib, absorbed",
        ),
        ({"prefill_workspace_mib": 0}, r"\['prefill_workspace_mib'\] is 0; accepted: 1 to"),
        ({"prefill_workspace_mib": True}, r"\['prefill_workspace_mib'\] is True"),
        ({"prefill": "flash_attn"}, "cannot attend here: torch.float32"),
    ],
)
def test_wrong_options_are_refused_by_name(monkeypatch, section, message):
    with pytest.raises(ValueError, match=message):
        make_impl(monkeypatch, ROW_320, torch.float32, config=engine_config(**section))


def test_the_section_of_options_must_be_an_object(monkeypatch):
    config = engine_config()
    config.additional_config = {"infinite_context": "turing"}
    with pytest.raises(ValueError, match="is 'turing'; accepted: an object"):
        make_impl(monkeypatch, ROW_320, torch.float32, config=config)


def test_options_choose_kernels(monkeypatch):
    config = engine_config(decode="triton", prefill="torch")
    impl = make_impl(monkeypatch, ROW_320, torch.float32, config=config)
    batch = Batch(ROW_320, BATCHES["mixed"], torch.float32).prepare(monkeypatch)
    impl.kv_b_proj, batch.impl = batch.impl.kv_b_proj, impl
    metadata = make_builder(ROW_320).build(0, batch.common())
    with pytest.raises(ValueError, match="implementation is 'torch', which cannot compute"):
        batch.run(metadata)


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
def test_every_kernel_is_tried_before_the_first_request(monkeypatch, kv_dtype):
    batch = Batch(ROW_320, BATCHES["decode"], torch.float32, kv_dtype).prepare(monkeypatch)
    ran = []
    for name in ("_decode", "_attend"):
        original = getattr(batch.impl, name)
        monkeypatch.setattr(
            batch.impl, name, lambda *a, _name=name, _run=original, **k: ran.append(_name) or _run(*a, **k)
        )
    batch.impl.warm_up(torch.device("cpu"), page_tokens=64, query_tokens=[1, 4])
    assert ran.count("_decode") == 2 and ran.count("_attend") == 6


def test_a_kernel_that_cannot_run_here_stops_the_start(monkeypatch):
    for option, message in (({"decode": "triton"}, "triton"), ({"prefill": "torch"}, "torch")):
        batch = Batch(ROW_320, BATCHES["decode"], torch.float32, options=option).prepare(monkeypatch)
        with pytest.raises(ValueError, match=f"implementation is '{message}', which cannot compute"):
            batch.impl.warm_up(torch.device("cpu"), page_tokens=64, query_tokens=[1])


def test_pages_that_suit_the_kernel_for_hopper():
    assert LatentBackend.supports_block_size(64) and not LatentBackend.supports_block_size(16)
    assert LatentBackend.get_preferred_block_size(16) == 64
    assert LatentBackend.get_kv_cache_shape(7, 64, 1, 320) == (7, 64, 320)


def test_the_scale_of_an_fp8_cache_is_used(monkeypatch):
    batch = Batch(ROW_320, BATCHES["mixed"], torch.float32, "fp8").prepare(monkeypatch)
    metadata = make_builder(ROW_320).build(0, batch.common())
    batch.k_scale.fill_(FP8_SCALE * 3)
    batch.layer._k_scale_float = FP8_SCALE * 3
    expected = batch.expected(metadata.num_decodes)
    assert (batch.run(metadata) - expected).norm() / expected.norm() > 0.1
