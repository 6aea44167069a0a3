"""The text decoder: grouped-query attention and layer (transformers' `Qwen2_5OmniThinkerTextModel`,
`Qwen3OmniMoeThinkerTextModel`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from omni.cache import CHUNK
from omni.config import DecoderConfig
from omni.layers import HALVES, Linear, RMSNorm, SwiGLU, compiled_on_a_gpu, float32_product, part
from omni.moe import Experts
from omni.rope import rotate
from seats.operators import operator


class Attention(nn.Module):
    """Causal grouped-query attention. q, k and v are one product, with biases or with norms per head on q and k."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=not config.qk_norm)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def prefill(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, S, hidden) → what attention adds to it, and keys and values, (B, kv_heads, S, dim)."""
        q, k, v = self.project(x, rotary)
        shared = groups_in_kernels(q)
        every = [k, v] if shared else [each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v)]
        mixed = F.scaled_dot_product_attention(q, every[0], every[1], is_causal=True, enable_gqa=shared)
        return self.output(rearrange(mixed, "b h s d -> b s (h d)")), k, v

    def extend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, index: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`prefill` of what comes after positions whose keys and values are there, (B, kv_heads, P, dim).

        index: (B, S + P or less) where those of the whole lie, in order, in the given ones followed by those of x.
        known: (B,) how many of them are before x. Returns keys and values of the whole.
        """
        q, *own = self.project(x, rotary)
        index = index[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
        k, v = (torch.cat(both, dim=2).gather(2, index) for both in zip((keys, values), own, strict=True))
        return self.output(attend_after(q, k, v, known, keys.shape[2])), k, v

    def decode(
        self, x: Tensor, norm: RMSNorm, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, written: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One position, (B, 1, hidden), after those in a cache (`attend`) → x and what attention of norm(x) adds to it;
        keys and values as `prefill`."""
        if compiled_on_a_gpu(x):
            norms = [None if each is None else each.weight for each in (self.query_norm, self.key_norm)]
            eps = 0.0 if self.query_norm is None else self.query_norm.eps
            cos, sin = (rearrange(table, "b 1 1 half -> b half") for table in rotary)
            qkv = rearrange(self.qkv(x, norm=norm), "b 1 rows -> b rows")
            mixed, k, v = cached_attention(qkv, *norms, eps, cos, sin, keys, values, written)
            return self.output(mixed.unsqueeze(1), residual=x), k, v
        q, k, v = self.project(x, rotary, norm)
        mixed = attend(rearrange(q, "b (kv group) 1 d -> b kv group d", kv=self.kv_heads), k, v, keys, values, written)
        return self.output(rearrange(mixed, "b kv group d -> b 1 (kv group d)"), residual=x), k, v

    def project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], norm: RMSNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned, and values, (B, heads, S, dim) each."""
        qkv = rearrange(self.qkv(x, norm=norm), "b s (h d) -> b h s d", h=self.heads + 2 * self.kv_heads)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(self._normed(q, self.query_norm), *rotary), rotate(self._normed(k, self.key_norm), *rotary)
        # Values of their own: as a view they would keep the whole product alive in the cache, and compiled regions
        # (torch 2.13, CPU) hand out views of memory that they use again.
        return q, k, v.clone(memory_format=torch.contiguous_format)

    def query_and_keys(self, x: Tensor, rotary: tuple[Tensor, Tensor], asking: Tensor) -> tuple[Tensor, Tensor]:
        """The query of one position of each sequence, (B, heads, 1, dim), and all keys, (B, kv_heads, S, dim).

        x: (B, S, hidden). asking: (B,) which position. Only the rows of the product that are needed are computed.
        """
        rows = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        query_weight, key_weight, _ = self.qkv.weight.split(rows)
        query_bias, key_bias, _ = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.split(rows)
        place = asking[:, None, None]
        one = x.gather(1, place.expand(-1, 1, x.shape[-1]))
        q = rearrange(F.linear(one, query_weight, query_bias), "b s (h d) -> b h s d", h=self.heads)
        k = rearrange(F.linear(x, key_weight, key_bias), "b s (h d) -> b h s d", h=self.kv_heads)
        there = [table.gather(2, place[..., None].expand(-1, 1, 1, table.shape[-1])) for table in rotary]
        q = rotate(self._normed(q, self.query_norm), there[0], there[1])
        return q, rotate(self._normed(k, self.key_norm), *rotary)

    @staticmethod
    def _normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
        return x if norm is None else norm(x)


def groups_in_kernels(q: Tensor) -> bool:
    """Whether PyTorch has a kernel for heads that share keys which does not write all scores: on a GPU flash attention
    and cuDNN's alone, for 16 bits, from Ampere on. What else takes shared keys needs memory by the square of tokens."""
    if not q.is_cuda or q.dtype not in HALVES:
        return not q.is_cuda
    if torch.compiler.is_compiling():  # which cannot ask for the device; bfloat16 is not compiled before Ampere
        return q.dtype == torch.bfloat16
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


MASK = 2**26
"""Elements that a mask may have on a GPU, a quarter of it on a CPU: `attend_after` takes as many positions at a time.
For 64 s of video after as much, the 7B's whole mask would have 1.7 billion, of three bytes each."""


@operator("omni::attend_after")
def attend_after(q: Tensor, keys: Tensor, values: Tensor, known: Tensor, most: int) -> Tensor:
    """Causal attention of the positions that follow the `known` first, (B,), of a sequence, at most `most`.

    q: (B, heads, S, dim). keys, values: (B, kv_heads, N, dim), of the whole. With a mask, since what is known differs
    from row to row and from prompt to prompt of a graph. Returns (B, S, heads · dim).
    """
    (batch, heads, length, dim), (kv_heads, whole) = q.shape, keys.shape[1:3]
    group = heads // kv_heads
    rows = max(1, (MASK if q.is_cuda else MASK // 4) // (batch * group * whole))
    mixed = q.new_empty(batch, length, kv_heads, group, dim)
    for first in range(0, length, rows):
        asking = torch.arange(first, min(first + rows, length), device=q.device)
        before = min(whole, most + first + rows)  # what comes later none of them sees
        seen = torch.arange(before, device=q.device) <= (known[:, None] + asking)[:, None, :, None]
        # Heads that share keys are rows of one product: no copy of the keys, and kernels that know no groups.
        part = F.scaled_dot_product_attention(
            rearrange(q[:, :, first : first + rows], "b (kv group) s d -> b kv (group s) d", group=group),
            keys[:, :, :before],
            values[:, :, :before],
            attn_mask=repeat(seen, "b 1 s n -> b 1 (group s) n", group=group),
        )
        mixed[:, first : first + rows] = rearrange(part, "b kv (group s) d -> b s kv group d", group=group)
    return rearrange(mixed, "b s kv group d -> b s (kv group d)")


@attend_after.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


def attend(q: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, written: Tensor) -> Tensor:
    """Attention of one position to the cache and to itself: grouped heads, no copy of the cache.

    q: (B, kv_heads, group, dim). key, value: (B, kv_heads, 1, dim), its own. keys, values: (B, kv_heads, capacity,
    dim), a multiple of CHUNK, of which `written`, (B, capacity), are there. Chunk by chunk, then what the chunks yield
    by their weight: one query leaves too few rows to fill a GPU otherwise (as in flash-decoding,
    https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Scores, which released weights make hundreds large, are
    float32 from the product on. Returns (B, kv_heads, group, dim).
    """
    if q.device.type == "cpu" and q.dtype not in HALVES:
        return attend_at_once(q, key, value, keys, values, written)
    attend_chunks = chunks_on_a_cpu if q.device.type == "cpu" else chunks_on_a_device
    mixed, weights = attend_chunks(q, keys, values, rearrange(written, "b (c n) -> b c n", n=CHUNK))
    own = (q.float() * key.float()).sum(dim=-1) * q.shape[-1] ** -0.5
    shares = torch.cat((weights, own.unsqueeze(2)), dim=2).softmax(dim=2).unsqueeze(-1)
    return ((mixed * shares[:, :, :-1]).sum(dim=2) + shares[:, :, -1] * value).to(values.dtype)


def attend_at_once(q: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, written: Tensor) -> Tensor:
    """`attend` by one softmax over cache and position: the fewest steps, for float32 on a CPU, where a short cache
    takes longer to launch than to read."""
    q = q * q.shape[-1] ** -0.5
    scores = (q @ keys.mT).masked_fill(~written[:, None, None], float("-inf"))
    shares = torch.cat((scores, q @ key.mT), dim=-1).softmax(dim=-1)
    own, shares = shares[..., -1:], rearrange(shares[..., :-1], "b kv group (c n) -> b kv c group n", n=CHUNK)
    return (shares @ rearrange(values, "b kv (c n) d -> b kv c n d", n=CHUNK)).sum(dim=2) + own * value


NOT_THERE = torch.finfo(torch.float32).min
"""A score of what is not there. Not -∞, of which a chunk that holds nothing would make NaN."""


def chunks_on_a_device(q: Tensor, keys: Tensor, values: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Attention inside each chunk: what it yields, (B, kv_heads, chunks, group, dim), and the logarithm of the sum that
    its softmax divides by, (B, kv_heads, chunks, group) float32. written: (B, chunks, CHUNK); the rest: `attend`."""
    scores = float32_product(q.flatten(0, 1), keys.flatten(0, 1)).unflatten(0, q.shape[:2]) * q.shape[-1] ** -0.5
    scores = rearrange(scores, "b kv group (c n) -> b kv c group n", n=CHUNK)
    scores = scores.masked_fill(~written[:, None, :, None], NOT_THERE)
    weights = scores.logsumexp(dim=-1)
    shares = (scores - weights.unsqueeze(-1)).exp().to(values.dtype)
    return shares @ rearrange(values, "b kv (c n) d -> b kv c n d", n=CHUNK), weights


@operator("omni::cached_attention", device_types="cuda")
def cached_attention(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    written: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """All of `Attention.decode` between its two products.

    qkv: (B, (heads + 2 kv_heads) · dim), which alone the kernel right before may have written. query_norm, key_norm:
    (dim,), weights, where heads are normed. cos, sin: (B, dim / 2). The rest: `attend`. Returns what attention yields,
    (B, heads · dim), and the position's own key, normed and turned, and value, (B, kv_heads, 1, dim).
    """
    from omni.decoder_kernels import cached_attention_by_kernels

    return cached_attention_by_kernels(qkv, query_norm, key_norm, eps, cos, sin, keys, values, written, CHUNK)


@cached_attention.register_fake
def _(qkv: Tensor, query_norm: Any, key_norm: Any, eps: float, cos: Tensor, sin: Tensor, keys: Tensor, *_: Any) -> Any:
    batch, kv_heads, _capacity, dim = keys.shape
    own = [qkv.new_empty(batch, kv_heads, 1, dim) for _ in range(2)]
    return qkv.new_empty(batch, qkv.shape[1] - 2 * kv_heads * dim), *own


def chunks_on_a_cpu(q: Tensor, keys: Tensor, values: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """What `chunks_on_a_device` computes, by PyTorch's own kernel, for which each chunk is a head. It multiplies
    bfloat16 and float16, which most processors cannot, several times as fast as a product does, and sums scores in
    float32."""
    batch, kv_heads, chunks = *q.shape[:2], written.shape[1]
    mask = torch.zeros(written.shape, device=q.device).masked_fill(~written, NOT_THERE)
    mixed, weights = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        repeat(q, "b kv group d -> b (kv c) group d", c=chunks),
        *(rearrange(stored, "b kv (c n) d -> b (kv c) n d", n=CHUNK) for stored in (keys, values)),
        attn_mask=repeat(mask, "b c n -> b (kv c) 1 n", kv=kv_heads),
    )
    return mixed.view(batch, kv_heads, chunks, *mixed.shape[2:]), weights.unflatten(1, (kv_heads, chunks))


class Layer(nn.Module):
    """One layer of the text decoder: attention and an MLP or experts, each after a norm and added to what it was given
    (transformers' `Qwen2_5OmniDecoderLayer`, `Qwen3OmniMoeThinkerTextDecoderLayer`)."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            Experts(config)
            if config.is_sparse(index)
            else SwiGLU(config.hidden_size, config.intermediate_size, bias=False)
        )

    @part
    def prefill(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A whole sequence (B, S, hidden) → the same after this layer, and its keys and values."""
        mixed, keys, values = self.attention.prefill(self.attention_norm(x), rotary)
        x = x + mixed
        return self.mlp(x, norm=self.mlp_norm, residual=x), keys, values

    @part
    def extend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        known: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`prefill` of what comes after positions whose keys and values are there: `Attention.extend`."""
        mixed, keys, values = self.attention.extend(self.attention_norm(x), rotary, keys, values, index, known)
        x = x + mixed
        return self.mlp(x, norm=self.mlp_norm, residual=x), keys, values

    @part
    def decode(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, written: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One position, (B, 1, hidden), after those in a cache → as `prefill`."""
        x, key, value = self.attention.decode(x, self.attention_norm, rotary, keys, values, written)
        return self.mlp(x, norm=self.mlp_norm, residual=x), key, value

    def query_and_keys(self, x: Tensor, rotary: tuple[Tensor, Tensor], asking: Tensor) -> tuple[Tensor, Tensor]:
        """As this layer's own attention would make them of x: `Attention.query_and_keys`."""
        return self.attention.query_and_keys(self.attention_norm(x), rotary, asking)
