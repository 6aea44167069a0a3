"""The text decoder: grouped-query attention and layer (transformers' `Qwen2_5OmniThinkerTextModel`,
`Qwen3OmniMoeThinkerTextModel`)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.cache import Cache
from omni.config import DecoderConfig
from omni.layers import RMSNorm, SwiGLU
from omni.moe import Experts
from omni.rope import rotate


class Attention(nn.Module):
    """Causal grouped-query attention. q, k and v are one product, with biases or with norms per head on q and k."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=not config.qk_norm)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.output = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache, layer: int) -> Tensor:
        """x: (B, S, hidden). S > 1 is a prefill into an empty cache, S = 1 one decoding step."""
        qkv = rearrange(self.qkv(x), "b s (h d) -> b h s d", h=self.heads + 2 * self.kv_heads)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache, layer)
        return x + self.mlp(self.mlp_norm(x))
