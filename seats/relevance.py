"""How much the question looks at each token."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def relevance(query: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """The attention that one query pays to every token, averaged over the heads: (B, S) float32.

    query: (B, heads, 1, dim) of the last text token. keys: (B, kv_heads, S, dim), each shared by heads / kv_heads
    query heads in a row. Both after rotary. valid: (B, S) bool; the others take no part and get 0.
    """
    grouped = rearrange(query.float(), "b (kv group) 1 dim -> b kv group dim", kv=keys.shape[1])
    logits = grouped @ keys.float().mT * query.shape[-1] ** -0.5
    attention = logits.masked_fill(~valid[:, None, None], float("-inf")).softmax(dim=-1)
    return attention.mean(dim=(1, 2)).masked_fill(~valid, 0)
