"""Triton's kernels without a GPU: compiled for one that is not there, and run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.processes import python

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compiled_for_hopper(
    kernel: Any, types: Mapping[str, str], values: Mapping[str, Any], aligned: tuple[str, ...] = (), **options: Any
) -> Any:
    """What Triton makes of a kernel: the interpreter checks no types, shapes and memory.

    types: of arguments, "i32" of those that it lacks. values: of what is constant. aligned: types, or how they begin,
    whose arguments are multiples of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kinds = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.startswith(aligned)}
    return compile(ASTSource(kernel, kinds, dict(values), hints), target=GPUTarget("cuda", 90, 32), options=options)


def place_of_wait(code: Any) -> int:
    """Where in its PTX a kernel waits for the one before: once on all paths, then it lets the next one begin, and it
    stores nothing before."""
    ptx = code.asm["ptx"]
    marks = re.findall(r"griddepcontrol\.wait|griddepcontrol\.launch_dependents|st\.global|\bret;", ptx)
    assert marks[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert not any("griddepcontrol" in mark for mark in marks[2:])
    return int(ptx.index("griddepcontrol.wait"))


def bytes_spilt(code: Any, folder: Path) -> int:
    """Of a thread's memory: what its registers do not hold."""
    from triton import knobs

    (folder / "cubin").write_bytes(code.asm["cubin"])
    command = (knobs.nvidia.cuobjdump.path, "-res-usage", folder / "cubin")
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def interpreted(code: str) -> None:
    """Runs `code` by the interpreter, in a process of its own, as Triton reads its mode once."""
    import numpy as np
    import triton

    # It counts loops by arrays of one number, which NumPy 2.4 takes for none.
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}")
    python("-c", code, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
