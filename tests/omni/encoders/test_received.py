"""Attention that positions receive: against the whole matrix at once."""

from __future__ import annotations

import pytest
import torch

from omni.encoders import received
from omni.encoders.received import received_attention


@pytest.mark.parametrize("scores", [1, 50, 2**20])
def test_equals_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """However few queries are taken at a time."""
    monkeypatch.setitem(received.SCORES_AT_A_TIME, "cpu", scores)
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 3, 17, 8).unbind()
    expected = (q @ k.mT / 8**0.5).softmax(-1).mean(1).sum(1)
    torch.testing.assert_close(received_attention(q, k), expected)


def test_invalid_positions_neither_ask_nor_are_asked() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 3, 2, 10, 8).unbind()
    valid = torch.arange(10) < torch.tensor([10, 6, 0])[:, None]
    got = received_attention(q, k, valid)
    torch.testing.assert_close(got[0], received_attention(q[:1], k[:1])[0])
    torch.testing.assert_close(got[1, :6], received_attention(q[1:2, :, :6], k[1:2, :, :6])[0])
    assert not got[1, 6:].any()
    assert not got[2].any()
