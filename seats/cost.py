"""What a prefill costs, by count."""

from __future__ import annotations

from collections.abc import Sequence


def prefill_macs(
    seq_len: int,
    drops: Sequence[tuple[int, int]],
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    head_dim: int | None = None,
) -> int:
    """Multiply-accumulates of a decoder's prefill.

    drops: (layer counted from 0, tokens left after it), rising; none for the full prefill. `head_dim` where it is not
    hidden_size / num_heads. For experts, `intermediate_size` is experts per token times the size of one; the router,
    experts / (3 · that) of the MLP, is not counted.

    Counted as in the paper: the products of attention and of the gated MLP, scores and weighted values over the whole
    square of the sequence (no saving for causality), and the head on every token that is left. Norms, rotary and the
    selections themselves are not. One thing differs: the paper's code takes hidden_size / num_heads for `head_dim`, 64
    for Qwen3-Omni-30B-A3B, whose heads have 128. Ours is the true one, so that our TFLOPs for that model are higher.
    """
    after = dict(drops)
    width = num_heads * (head_dim or hidden_size // num_heads)
    kv_width = width // num_heads * num_kv_heads
    per_token = 2 * hidden_size * (width + kv_width) + 3 * hidden_size * intermediate_size
    total, tokens = 0, seq_len
    for layer in range(num_layers):
        total += tokens * per_token + 2 * tokens**2 * width
        tokens = after.get(layer, tokens)
    return total + tokens * hidden_size * vocab_size
