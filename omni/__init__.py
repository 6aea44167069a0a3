"""Qwen-Omni thinkers in plain PyTorch: questions about video with sound."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.engine import Prefill
    from omni.inputs import Inputs
    from omni.kept import explain
    from omni.model import Generation, Omni, load
    from omni.show import Page, show

__version__ = "0.2.0"

__all__ = ["Generation", "Inputs", "Omni", "Page", "Prefill", "__version__", "explain", "load", "show"]

PLACES = {
    "Generation": "omni.model",
    "Inputs": "omni.inputs",
    "Omni": "omni.model",
    "Page": "omni.show",
    "Prefill": "omni.engine",
    "explain": "omni.kept",
    "load": "omni.model",
}
"""Imported when first asked for: a command line that only says its version needs no PyTorch."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    @property
    def show(self) -> Any:
        """The function, not the file of that name, whichever is imported first."""
        return import_module("omni.show").show

    @show.setter
    def show(self, module: ModuleType) -> None:
        """Imports set what they import in its package."""


sys.modules[__name__].__class__ = _Package
