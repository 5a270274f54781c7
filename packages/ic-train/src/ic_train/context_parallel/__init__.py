"""Context parallelism: one sequence over several processes, by ring attention over latent rows.

`layout` says which tokens a process has, `blocks` computes attention between two runs of tokens, `ring` passes
the rows around, and `attention` makes all of it an attention implementation of transformers.
"""

from ic_train.context_parallel.attention import MLA_PREFILL, RING, register_attention
from ic_train.context_parallel.layout import SequenceLayout, local_tokens
from ic_train.context_parallel.ring import Ring

__all__ = ["MLA_PREFILL", "RING", "Ring", "SequenceLayout", "local_tokens", "register_attention"]
