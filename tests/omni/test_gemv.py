"""Matrix-vector products on a CPU: what is chosen by measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni import gemv, layers


@pytest.mark.parametrize(
    ("seconds", "compiled", "expected"),
    [
        ({"tall": 4, "transposed": 3, "wide": 2}, False, (True, False)),
        ({"tall": 3, "transposed": 4, "wide": 2}, False, (False, False)),
        ({"tall": 4, "transposed": 3, "wide": 2, "sum": 2}, True, (False, True)),
        ({"tall": 4, "transposed": 2, "wide": 2, "sum": 3}, True, (True, True)),
        ({"tall": 4, "transposed": 3, "wide": 2, "sum": 5}, True, (True, False)),
        ({"tall": 2, "transposed": 3, "wide": 1, "sum": 5}, True, (False, False)),
    ],
)
def test_the_fastest_is_chosen(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], compiled: bool, expected: tuple[bool, bool]
) -> None:
    """Of layouts and products together; compiled code reads what was chosen."""
    monkeypatch.setattr(gemv, "BYTES", 2**20)
    monkeypatch.setattr(gemv, "measure", lambda ways: {name: seconds[name] for name in ways})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(layers, "_by_sum", {})
    chosen = gemv.choose.__wrapped__(torch.float32, compiled=compiled)
    assert (chosen.transposed, chosen.by_sum) == expected
    assert layers.by_sum(torch.float32) == (expected[1] if compiled else True)


def test_measuring_takes_turns_and_gives_up_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own."""
    now, calls = [0.0], []
    monkeypatch.setattr("omni.gemv.time.perf_counter", lambda: now[0])

    def takes(name: str, *seconds: float) -> Any:
        left = list(seconds)

        def run() -> torch.Tensor:
            calls.append(name)
            now[0] += left.pop(0) if len(left) > 1 else left[0]
            return torch.empty(0)

        return run

    measured = gemv.measure({"a": takes("a", 5, 3, 4), "b": takes("b", 2, 1), "slow": takes("slow", 30)})
    assert measured == {"a": 3, "b": 1, "slow": 30}
    assert calls[:5] == ["a", "b", "slow", "a", "b"]
    assert calls.count("slow") == 1
