"""Operators of our own for the compiler, which it takes as they are and does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARIES: dict[str, torch.library.Library] = {}
"""By namespace; an operator lives as long as its library."""


class Operator:
    """What `torch.library.custom_op` makes of a function that changes none of its arguments, with the same methods.

    That one wraps every kernel so that the first call imports the compiler, a second for whoever compiles nothing.
    """

    def __init__(self, name: str, function: Callable[..., Any], device_types: str | None) -> None:
        self.name, self.__doc__ = name, function.__doc__
        namespace, self._short = name.split("::")
        if namespace not in LIBRARIES:
            LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
        self._library = LIBRARIES[namespace]
        schema = torch.library.infer_schema(function, mutates_args=())
        self._library.define(self._short + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(getattr(torch.ops, namespace), self._short).default
        self._backward: Callable[..., Any] = self._refuse
        self._setup: Callable[..., Any] | None = None
        torch.library.register_autograd(
            name,
            lambda *gradients: self._backward(*gradients),
            setup_context=lambda **saved: self._setup(**saved) if self._setup else None,
            lib=self._library,
        )
        if device_types is None:
            self._library.impl(self._short, function, "CompositeExplicitAutograd")
        else:
            self.register_kernel(device_types)(function)

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_kernel(self, device_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What runs on cpu or cuda."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._library.impl(self._short, function, device_type.upper())
            return function

        return register

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, without data."""
        return torch.library.register_fake(self.name, function, lib=self._library)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        self._backward, self._setup = backward, setup_context

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(f"{self.name} has no gradient.")


def operator(name: str, *, device_types: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Registers a function as an operator, "namespace::name", on one device type or on all."""
    return lambda function: Operator(name, function, device_types)
