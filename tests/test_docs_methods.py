"""The example of docs/methods.md runs as it stands, and registering from outside works at run time."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import omni.arguments
import seats
from seats.methods import METHODS, names
from seats.methods.random import Random

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_the_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 35 lines, blank ones among them; what it registers is found by name and keeps what was asked for."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.S)
    assert len(example.splitlines()) <= 35
    found: dict[str, Any] = {"__name__": "example"}
    monkeypatch.setitem(sys.modules, "example", type(sys)("example"))  # where a dataclass looks for its names
    exec(compile(example, "docs/methods.md", "exec"), found)
    assert "Generation(" in capsys.readouterr().out
    assert "longest" in names() and "longest" in omni.arguments.methods()
    method = seats.method_for("longest", found["model"].config, 0.35)
    prefill = found["model"].prefill(found["inputs"], seats=method)
    video, audio = (prefill.tokens[kind] for kind in ("video", "audio"))
    rounding = 64  # a token of each window
    assert (
        prefill.segments[0]
        < prefill.tokens["text"] + method.video_ratio * video + method.audio_ratio * audio + rounding
    )


def test_a_registered_method_is_asked_for_by_name() -> None:
    seats.register("mine", Random)
    options = omni.arguments.settings_parser().parse_args(["--method", "mine"])
    assert options.method == "mine" and seats.METHODS["mine"] is Random
    seats.METHODS["plain"] = Random

    class Config:
        family = "qwen2_5_omni"

        class decoder:  # noqa: N801
            num_layers, hidden_size = 28, 3584

    for name in ("mine", "plain"):
        assert isinstance(seats.method_for(name, Config, 0.35), Random)


def test_what_cannot_be_registered_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a method 'seats' already"):
        seats.register("seats", Random)
    with pytest.raises(ValueError, match="there is a method 'dycoke' already"):
        seats.register("dycoke", Random)
    with pytest.raises(ValueError, match="small letters, digits and hyphens, not 'My method'"):
        seats.register("My method", Random)

    @dataclass
    class Loose:
        video_ratio: float
        audio_ratio: float

    with pytest.raises(TypeError, match="Loose must be a dataclass that is frozen"):
        seats.register("loose", Loose)  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class Ratios:
        video_ratio: float
        audio_ratio: float

    @dataclass(frozen=True, kw_only=True)
    class Listed(Random):
        some: list[int] = field(default_factory=list)

    with pytest.raises(TypeError, match=r"Ratios is no method: it lacks needs, .*before.* of seats\.method\.Method"):
        seats.register("ratios", Ratios)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Listed must be hashable, and so its fields: unhashable type: 'list'"):
        seats.register("listed", Listed)
    with pytest.raises(TypeError, match="what makes a method is called with video_ratio and audio_ratio"):
        seats.register("made", Random(video_ratio=0.5, audio_ratio=0.5))  # type: ignore[arg-type]
    assert not {"loose", "ratios", "listed", "made"} & set(names())
