"""The text decoder: grouped-query attention and layer (transformers' `Qwen2_5OmniThinkerTextModel`,
`Qwen3OmniMoeThinkerTextModel`)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.cache import Cache, Recorder
from omni.config import DecoderConfig
from omni.layers import RMSNorm, SwiGLU
from omni.moe import Experts
from omni.rope import rotate


class Attention(nn.Module):
    """Causal grouped-query attention. q, k and v are one product, with biases or with norms per head on q and k."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=not config.qk_norm)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.output = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | Recorder, layer: int) -> Tensor:
        """x: (B, S, hidden). S > 1 is a prefill into an empty cache, S = 1 one decoding step."""
        qkv = rearrange(self.qkv(x), "b s (h d) -> b h s d", h=self.heads + 2 * self.kv_heads)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(self._normed(q, self.query_norm), *rotary), rotate(self._normed(k, self.key_norm), *rotary)
        all_keys, all_values = cache.write(layer, k, v)
        if x.shape[1] > 1:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # One query sees every key, so the queries that share a key head stand in for query positions:
            # grouped attention with no copy of the cache.
            grouped = rearrange(q, "b (kv g) 1 d -> b kv g d", kv=self.kv_heads)
            mixed = F.scaled_dot_product_attention(grouped, all_keys, all_values)
            mixed = rearrange(mixed, "b kv g d -> b (kv g) 1 d")
        return self.output(rearrange(mixed, "b h s d -> b s (h d)"))

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


class Layer(nn.Module):
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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | Recorder, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache, layer)
        return x + self.mlp(self.mlp_norm(x))

    def query_and_keys(self, x: Tensor, rotary: tuple[Tensor, Tensor], asking: Tensor) -> tuple[Tensor, Tensor]:
        """As this layer's own attention would make them of x: `Attention.query_and_keys`."""
        return self.attention.query_and_keys(self.attention_norm(x), rotary, asking)
