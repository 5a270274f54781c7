"""What the attention of a step needs to know about its batch, made once for all layers.

Letters: B requests, T query tokens of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ic_vllm_plugin import compat
from ic_vllm_plugin.options import read_options
from ic_vllm_plugin.prefill import ContextPass, locate_context, plan_context
from ic_vllm_plugin.workspace import workspace_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBatch:
    """Requests that follow each other and run absorbed.

    Args:
        tokens: their query tokens.
        block_table: `[B, pages]` int32.
        seq_lens: `[B]` int32, cached tokens with this step's; 0 for a request that only fills a CUDA graph.
        query_tokens: T, what the kernel is launched with: at least the most query tokens of a request.
        rows: None where every request has T. Else `[tokens]` int64, each token's row among `B * T`: a shorter
            request takes the last rows of its T, as the kernel's causal mask is aligned to the end.
    """

    tokens: slice
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_tokens: int
    rows: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """The requests that run expanded.

    Args:
        query_starts: `[requests + 1]` int32, from 0.
        max_query_tokens: the longest.
        context: passes over what is cached before this step's tokens.
        chunked_context: asked for by MLAAttention on other backends' account.
    """

    query_starts: torch.Tensor
    max_query_tokens: int
    context: list[ContextPass]
    chunked_context: None = None


@dataclass
class LatentMetadata(compat.AttentionMetadata):
    """One step's batch, short queries first; all layers share it.

    Args:
        num_reqs, num_actual_tokens, max_query_len, max_seq_len: of the batch, as vLLM gives them.
        query_start_loc: `[requests + 1]` int32.
        slot_mapping: `[tokens]` where each token's row goes.
        num_decodes, num_decode_tokens: requests and query tokens that run absorbed.
        num_prefills: requests that run expanded.
        decode, prefill: the two parts; of the first, decode steps come before short questions.
        causal: always.
    """

    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: list[DecodeBatch] | None
    prefill: PrefillBatch | None
    causal: bool = True


class LatentMetadataBuilder(compat.AttentionMetadataBuilder):
    """Makes `LatentMetadata` from what the model runner knows about a step.

    A decode step's metadata are views of the runner's own buffers, so that a CUDA graph can hold them.
    """

    # full CUDA graphs for decode, also with as many query tokens of every request (speculative decoding)
    _cudagraph_support: ClassVar[Any] = compat.AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # of a decode step: the next token and its drafts
        self.decode_tokens = self.reorder_batch_threshold
        # what the model runner moves to the front, and we let run absorbed
        absorbed_tokens = read_options(vllm_config).absorbed_tokens or 1
        self.reorder_batch_threshold = max(self.decode_tokens, absorbed_tokens)
        self.page_tokens = kv_cache_spec.block_size
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.workspace_tokens = workspace_tokens(vllm_config, layer)
        # with drafts in flight, the host's lengths are upper bounds
        self.host_lengths_are_exact = vllm_config.speculative_config is None
        if device.type == "cuda":
            layer.impl.warm_up(device, page_tokens=self.page_tokens, query_tokens=self._launched_with())

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> LatentMetadata:
        """Metadata of one step."""
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = compat.split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        starts = common.query_start_loc_cpu.numpy()
        return LatentMetadata(
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            slot_mapping=common.slot_mapping,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            num_prefills=prefills,
            decode=self._decode(common, starts[: decodes + 1], decode_tokens) if decodes else None,
            prefill=self._prefill(common, decodes, starts[decodes : common.num_reqs + 1])
            if prefills
            else None,
        )

    def _launched_with(self) -> list[int]:
        """Numbers of query tokens that the kernel is launched with: few, as each is compiled for itself."""
        sizes = {1, self.decode_tokens}
        if self.reorder_batch_threshold > self.decode_tokens:
            sizes |= {1 << power for power in range(3, (self.reorder_batch_threshold - 1).bit_length() + 1)}
        return sorted(sizes)

    def _decode(self, common: Any, starts: np.ndarray, tokens: int) -> list[DecodeBatch]:
        """Decode steps, and behind them short questions, whose more tokens would be padding for the former."""
        longer = np.flatnonzero(np.diff(starts) > self.decode_tokens)
        requests = len(starts) - 1
        first = int(longer[0]) if len(longer) else requests
        # tokens beyond the requests' fill a CUDA graph
        ends = [(0, first, int(starts[first]) if first < requests else tokens), (first, requests, tokens)]
        return [self._absorbed(common, starts, low, high, end) for low, high, end in ends if low < high]

    def _absorbed(self, common: Any, starts: np.ndarray, low: int, high: int, end: int) -> DecodeBatch:
        begin, requests = int(starts[low]), high - low
        lengths = np.diff(starts[low : high + 1])
        longest = int(lengths.max())
        size = next(size for size in self._launched_with() if size >= longest)
        rows = None
        # requests without tokens, at the end, fill a CUDA graph: the tokens are padded for them, too
        if end - begin != requests * size or ((lengths != size) & (lengths != 0)).any():
            # each token's distance from its request's end
            distances = np.repeat(starts[low + 1 : high + 1], lengths) - np.arange(begin, starts[high])
            places = np.repeat(np.arange(1, requests + 1) * size, lengths) - distances
            rows = torch.from_numpy(places).to(self.device, non_blocking=True)
        return DecodeBatch(
            tokens=slice(begin, end),
            block_table=common.block_table_tensor[low:high],
            seq_lens=common.seq_lens[low:high],
            query_tokens=size,
            rows=rows,
        )

    def _prefill(self, common: Any, first: int, starts: np.ndarray) -> PrefillBatch:
        bounds = starts - starts[0]
        queries = np.diff(bounds)
        block_table = common.block_table_tensor[first:]
        context = self._lengths(common)[first : first + len(queries)] - queries
        return PrefillBatch(
            query_starts=torch.from_numpy(bounds.astype(np.int32)).to(self.device, non_blocking=True),
            max_query_tokens=int(queries.max()),
            context=[
                locate_context(pieces, bounds.tolist(), block_table, self.page_tokens)
                for pieces in plan_context(context.tolist(), self.workspace_tokens)
            ],
        )

    def _lengths(self, common: Any) -> np.ndarray:
        """Cached tokens of each request."""
        host = common.seq_lens_cpu_upper_bound
        exact = host is not None and self.host_lengths_are_exact
        return (host if exact else common.seq_lens.cpu()).numpy()
