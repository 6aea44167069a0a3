"""A block of the audio encoder beside transformers', where float16 overflows."""

from __future__ import annotations

import pytest

from tests.omni.pairs import FAMILIES, make_request


@pytest.mark.parametrize("family", FAMILIES)
def test_what_overflows_in_float16_is_clamped(make_pair, family: str) -> None:
    """Protects: a sum beyond what float16 holds makes no NaN of the whole answer, as in transformers' layers."""

    def adjusted(whole) -> None:
        for name, parameter in whole.named_parameters():
            if "audio_tower.layers.0.fc2.weight" in name:
                parameter.data[3] *= 1e5

    pair = make_pair(family, adjust=adjusted)
    inputs = make_request(pair, [("text", 2), ("audio", 220), ("text", 3)])
    exact = pair.model.thinker.encode(inputs)[0]["audio"][0]
    mixed = pair.model.thinker.half().encode(inputs)[0]["audio"][0]
    assert exact.isfinite().all()
    assert mixed.isfinite().all()
    assert (mixed.float() - exact).norm() < 0.3 * exact.norm()  # the one channel is cut
