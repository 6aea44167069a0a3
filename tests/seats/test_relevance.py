"""Relevance: grouped attention of one query, in float32, over the valid tokens alone."""

from __future__ import annotations

import torch

from seats.relevance import relevance


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 6, 1, 8).to(dtype), torch.randn(2, 3, 10, 8).to(dtype)


def test_equals_attention_head_by_head() -> None:
    query, keys = example()
    result = relevance(query, keys, torch.ones(2, 10, dtype=torch.bool))
    for row in range(2):
        heads = [(keys[row, head // 2] @ query[row, head, 0] / 8**0.5).softmax(0) for head in range(6)]
        torch.testing.assert_close(result[row], torch.stack(heads).mean(0), atol=1e-6, rtol=1e-5)


def test_invalid_tokens_take_no_part() -> None:
    """Not even where they hold no number, nor in a row that has nothing valid."""
    query, keys = example()
    lengths = torch.tensor([7, 0])
    valid = torch.arange(10) < lengths[:, None]
    result = relevance(query, keys.masked_fill(~valid[:, None, :, None], float("nan")), valid)
    alone = relevance(query[:1], keys[:1, :, :7], valid[:1, :7])
    torch.testing.assert_close(result[:1, :7], alone, atol=1e-7, rtol=0)
    assert result.masked_select(~valid).eq(0).all()


def test_computes_in_float32() -> None:
    query, keys = example(torch.bfloat16)
    valid = torch.ones(2, 10, dtype=torch.bool)
    result = relevance(query, keys, valid)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, relevance(query.float(), keys.float(), valid), atol=0, rtol=0)
