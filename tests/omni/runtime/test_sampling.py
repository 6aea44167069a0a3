"""Sampling: cuts keep what they should, draws follow the distribution, seeds repeat."""

from __future__ import annotations

import pytest
import torch

from omni.runtime.sampling import Sampling, draw_noise, pick

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0]])


def draws(sampling: Sampling, count: int = 4000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pick(LOGITS.expand(count, -1), sampling, draw_noise(sampling, (count, 4), generator))


def test_greedy_takes_the_largest() -> None:
    assert pick(LOGITS, Sampling()).tolist() == [1]


def test_draws_follow_the_softmax_at_a_temperature() -> None:
    share = draws(Sampling(temperature=2.0)).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, (LOGITS[0] / 2).softmax(0), atol=0.03, rtol=0)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert set(draws(Sampling(temperature=5.0, top_k=2)).tolist()) == {1, 3}
    # softmax(LOGITS) = .032, .644, .087, .237: the first token alone misses 0.7, with the second it is there.
    assert set(draws(Sampling(temperature=1.0, top_p=0.7)).tolist()) == {1, 3}
    assert set(draws(Sampling(temperature=1.0, top_p=1e-6)).tolist()) == {1}


def test_seed_repeats() -> None:
    assert torch.equal(draws(Sampling(temperature=1.0)), draws(Sampling(temperature=1.0)))
    assert not torch.equal(draws(Sampling(temperature=1.0)), draws(Sampling(temperature=1.0), seed=1))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_refuses_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
