"""Settings: presets hold the paper's numbers, what cannot run is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import seats

GOOD = seats.SeatsConfig(video_ratio=0.3, audio_ratio=0.6, drop_layers=(2, 4), late_layer=7, window_temperature=0.1)


def model(family: str, num_layers: int, hidden_size: int = 2048) -> Any:
    return SimpleNamespace(family=family, decoder=SimpleNamespace(num_layers=num_layers, hidden_size=hidden_size))


@pytest.mark.parametrize(
    ("name", "retention", "ratios"),
    [
        ("qwen2.5-omni-7b", 0.35, (0.30, 0.65)),
        ("qwen2.5-omni-7b", 0.25, (0.20, 0.55)),
        ("qwen2.5-omni-7b", 0.15, (0.10, 0.45)),
        ("qwen2.5-omni-7b", 0.10, (0.06, 0.35)),
        ("qwen3-omni-30b-a3b", 0.35, (0.32, 0.70)),
        ("qwen3-omni-30b-a3b", 0.25, (0.22, 0.60)),
        ("qwen3-omni-30b-a3b", 0.15, (0.12, 0.50)),
        ("qwen3-omni-30b-a3b", 0.10, (0.07, 0.45)),
    ],
)
def test_presets_hold_the_papers_ratios_to_the_last_bit(
    name: str, retention: float, ratios: tuple[float, float]
) -> None:
    config = seats.preset(name, retention)
    assert (config.video_ratio, config.audio_ratio) == ratios


def test_presets_hold_the_papers_layers_and_temperatures() -> None:
    small, large = seats.preset("qwen2.5-omni-7b"), seats.preset("qwen3-omni-30b-a3b")
    assert (small.drop_layers, small.late_layer, small.window_temperature) == ((16, 18, 20), 24, 0.1)
    assert (large.drop_layers, large.late_layer, large.window_temperature) == ((27, 31, 35), 40, 0.3)
    assert small.encoder_ratio_scale == large.encoder_ratio_scale == 1.4
    assert small == seats.preset("qwen2.5-omni-7b", 0.35)


def test_retention_between_and_below_the_rows() -> None:
    between = seats.preset("qwen2.5-omni-7b", 0.20)
    assert (between.video_ratio, between.audio_ratio) == (pytest.approx(0.15), pytest.approx(0.50))
    below = seats.preset("qwen2.5-omni-7b", 0.05)
    assert (below.video_ratio, below.audio_ratio) == (pytest.approx(0.03), pytest.approx(0.175))
    assert seats.preset("qwen2.5-omni-7b", 1).keeps_everything
    assert not seats.preset("qwen2.5-omni-7b", 0.999).keeps_everything


def test_encoder_ratios_stop_at_one() -> None:
    assert seats.preset("qwen2.5-omni-7b", 0.10).encoder_ratios == (pytest.approx(0.084), pytest.approx(0.49))
    assert replace(GOOD, audio_ratio=0.9).encoder_ratios[1] == 1


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_preset_for_fits_every_depth_it_accepts(family: str) -> None:
    for num_layers in range(6, 100):
        config = seats.preset_for(model(family, num_layers), 0.25)
        config.check(num_layers)
        assert len(config.drop_layers) == 3


def test_preset_for_takes_the_same_fractions_of_the_depth() -> None:
    assert seats.preset_for(model("qwen2_5_omni", 28), 0.10) == seats.preset("qwen2.5-omni-7b", 0.10)
    assert seats.preset_for(model("qwen3_omni_moe", 48), 0.10) == seats.preset("qwen3-omni-30b-a3b", 0.10)
    assert seats.preset_for(model("qwen2_5_omni", 8, 192), 0.10) == seats.preset("tiny", 0.10)
    assert seats.preset_for(model("qwen2_5_omni", 8), 0.10) != seats.preset("tiny", 0.10)
    three_billion = seats.preset_for(model("qwen2_5_omni", 36))
    assert (three_billion.drop_layers, three_billion.late_layer) == ((21, 23, 26), 31)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video_ratio": 0.0}, "video_ratio must lie in"),
        ({"audio_ratio": 1.01}, "audio_ratio must lie in"),
        ({"audio_ratio": float("nan")}, "audio_ratio must lie in"),
        ({"encoder_ratio_scale": 0.0}, "encoder_ratio_scale must be above 0"),
        ({"window_temperature": -0.1}, "window_temperature must be above 0"),
        ({"drop_layers": (0, 4)}, "drop_layers must rise from layer 1"),
        ({"drop_layers": (4, 4)}, "drop_layers must rise"),
        ({"drop_layers": (4, 2)}, "drop_layers must rise"),
        ({"drop_layers": (2, 6)}, "before layer 6"),
        ({"drop_layers": (), "late_layer": 1}, "late_layer must be layer 2"),
    ],
)
def test_refuses_settings_that_cannot_work(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(GOOD, **change)


def test_refuses_layers_past_the_depth() -> None:
    GOOD.check(7)
    with pytest.raises(ValueError, match="late_layer 7 is past the model's 6 layers"):
        GOOD.check(6)
    with pytest.raises(ValueError, match="before the last of the model's 4 layers"):
        replace(GOOD, late_layer=None).check(4)


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.1])
def test_refuses_retentions_out_of_range(retention: float) -> None:
    with pytest.raises(ValueError, match="retention must lie in"):
        seats.preset("qwen2.5-omni-7b", retention)


def test_names_the_choices_where_there_is_no_preset() -> None:
    with pytest.raises(ValueError, match=r"choose one of qwen2\.5-omni-7b, qwen3-omni-30b-a3b, tiny"):
        seats.preset("qwen2.5-omni")
    with pytest.raises(ValueError, match="No preset for the family 'llama'"):
        seats.preset_for(model("llama", 28))
    with pytest.raises(ValueError, match="5 layers are too few"):
        seats.preset_for(model("qwen2_5_omni", 5))
