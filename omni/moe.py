"""Sparse experts: a router and grouped matrix products (transformers' `Qwen3OmniMoeThinkerTextSparseMoeBlock`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.config import DecoderConfig
from omni.layers import (
    RMSNorm,
    by_sum,
    float32_linear,
    matrix_vector,
    one_row_on_a_cpu,
    one_row_on_a_gpu,
    product_of_one_row,
)
from seats.operators import operator


class Experts(nn.Module):
    """SwiGLU experts, `num_experts_per_tok` of them for each token, weighted by the router's softmax.

    Rows of tokens are sorted by expert and multiplied in one grouped product per projection, so shapes depend on the
    number of tokens alone; on a GPU by kernels of our own (`moe_kernels.py`). Memory beside the weights:
    tokens · num_experts_per_tok rows.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.experts, self.per_token = config.num_experts, config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        )
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + the experts of norm(x), (B, S, hidden) all."""
        added = None if residual is None else residual.flatten(0, 1)
        if norm is not None and one_row_on_a_gpu(x):  # router and experts divide by the row's norm themselves
            logits = product_of_one_row(x, self.router.weight, norm=norm, float32=True).unsqueeze(0)
            shares, chosen = choose(logits, self.per_token, self.normalise, x.dtype)
            row = (x.flatten(0, 1), shares, chosen, self.gate_up, self.down, added, norm.weight, norm.eps)
            return weighted_experts(*row).view_as(x)
        tokens = (x if norm is None else norm(x)).flatten(0, 1)
        shares, chosen = self.route(tokens)
        if on_kernels(tokens):
            return weighted_experts(tokens, shares, chosen, self.gate_up, self.down, added, None, 0.0).view_as(x)
        out = self._in_turns(tokens, shares, chosen).view_as(x)
        return out if residual is None else residual + out

    def _in_turns(self, tokens: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """What `weighted_experts` computes, by PyTorch's operators."""
        if by_sum(tokens.dtype) and one_row_on_a_cpu(tokens):
            gate, up = matrix_vector(self.gate_up[chosen[0]], tokens).chunk(2, dim=-1)
            results = matrix_vector(self.down[chosen[0]], F.silu(gate) * up)
            return shares @ results
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(self.experts, device=tokens.device), right=True).int()
        rows = tokens.index_select(0, order // self.per_token)
        gate, up = grouped_product(rows, self.gate_up, ends).chunk(2, dim=-1)
        results = grouped_product(F.silu(gate).mul_(up), self.down, ends)
        # Gathers the results of each token and sums them by share in one pass, in the same order on every run.
        places = order.argsort().view_as(chosen)
        return F.embedding_bag(places, results, mode="sum", per_sample_weights=shares)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(n, hidden) → shares in the tokens' dtype and experts, (n, num_experts_per_tok) each."""
        logits = float32_linear(tokens, self.router.weight)
        if on_kernels(tokens):
            return choose(logits, self.per_token, self.normalise, tokens.dtype)
        shares, chosen = logits.softmax(dim=-1).topk(self.per_token, dim=-1)
        if self.normalise:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares.to(tokens.dtype), chosen


def on_kernels(x: Tensor) -> bool:
    """Whether these tokens go through `moe_kernels.py`, whose results have no gradient."""
    return x.is_cuda and not torch.is_grad_enabled()


@operator("omni::choose", device_types="cuda")
def choose(logits: Tensor, per_token: int, normalise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The experts with the largest softmax in float32: (n, experts) → shares in this dtype and int32 numbers."""
    from omni.moe_kernels import choose_on_device

    return choose_on_device(logits, per_token, normalise, dtype)


@choose.register_fake
def _(logits: Tensor, per_token: int, normalise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shares = logits.new_empty(logits.shape[0], per_token, dtype=dtype)
    return shares, torch.empty_like(shares, dtype=torch.int32)


@operator("omni::weighted_experts", device_types="cuda")
def weighted_experts(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
) -> Tensor:
    """residual + the sum of each token's experts by share: (n, hidden).

    x, residual: (n, hidden). norm: (hidden,), where x is yet to be divided by its root mean square, and multiplied by
    this. shares, chosen: (n, num_experts_per_tok), the experts of a token all different.
    gate_up: (experts, 2 · size, hidden). down: (experts, hidden, size).
    """
    from omni.moe_kernels import experts_on_device

    return experts_on_device(x, shares, chosen, gate_up, down, residual, norm, eps)


@weighted_experts.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("omni::grouped_product")
def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows times the transposed matrix of their group.

    rows: (n, in), sorted by group. weights: (groups, out, in). ends: (groups,) int32, where each group's rows end.
    Returns (n, out). An operator of its own because the compiler refuses PyTorch's in any dtype but bfloat16.
    """
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return product(rows, weights.mT, offs=ends)


@grouped_product.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])
