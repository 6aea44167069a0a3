"""Which room imports which: one way, without circles, and nothing heavy where none is asked for."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("omni", "seats", "weights")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports anywhere: inside functions and for the type checker alone, too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else node.module)
    return frozenset(found)


def own(name: str) -> set[str]:
    """Without a package's own front: `import omni` imports what it lists when that is asked for."""
    return {each for each in imports(name) if each in modules() and each not in (name, *PACKAGES)}


def test_nothing_imports_in_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(own(name)):
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("seats", {"seats", "torch", "einops", "triton"}),  # triton: kernels, on a GPU
        ("weights", {"weights", "torch", "safetensors", "huggingface_hub", "tqdm", "einops"}),
    ],
)
def test_rooms_know_what_they_may(room: str, allowed: set[str]) -> None:
    for name in modules():
        if name.split(".")[0] == room:
            tops = {each.split(".")[0] for each in imports(name)} - set(sys.stdlib_module_names)
            assert tops <= allowed, name


def test_nothing_imports_scripts_or_tests() -> None:
    for name in modules():
        assert not {each.split(".")[0] for each in imports(name)} & {"scripts", "tests", "conftest"}, name


def test_tests_import_from_no_conftest() -> None:
    """Each folder has one, and of those that pytest is given together only one has the name."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert "from " + "conftest import" not in path.read_text(encoding="utf-8"), path


def test_processing_knows_no_model() -> None:
    """Files become tensors without encoders, decoder or engine."""
    for name in modules():
        if name.startswith("omni.processing"):
            rooms = {each for each in own(name) if each.startswith("omni.")}
            others = {each for each in rooms if not each.startswith("omni.processing")}
            assert others <= {"omni.config", "omni.inputs", "omni.protocol", "omni.reuse"}, name


COMMANDS = {f"omni.{name}" for name in ("generate", "arguments", "answer", "chat", "batch", "rows", "lmms")}
ORDER = "thinker request stages prefix engine model".split()
"""Each may import those before it, none those after it."""


def test_the_model_knows_no_command() -> None:
    """What only command lines and lmms-eval need lies beside the model, which does without."""
    for name in set(modules()) - COMMANDS:
        assert not own(name) & COMMANDS, name


def test_who_imports_whom_is_as_architecture_says() -> None:
    assert own("seats.method") == {"seats.counts"}
    assert own("seats.plan") == {"seats.counts", "seats.method"}
    for name in ("config", "layers", "reuse"):
        assert all(each.endswith("_kernels") for each in own(f"omni.{name}") if each.startswith("omni.")), name
    for index, name in enumerate(ORDER):
        assert not own(f"omni.{name}") & {f"omni.{later}" for later in ORDER[index + 1 :]}, name
    parts = [name for name in modules() if re.match(r"omni\.(encoders|decoder|moe|rope|cache|gemv|\w+_kernels)", name)]
    for name in parts:
        assert not own(name) & {f"omni.{each}" for each in (*ORDER, "runtime", "context", "kept", "ahead")}, name
    assert own("omni.rows") == {"omni.arguments", "omni.inputs", "weights.files"}
    for name, other in (("kept", "engine"), ("ahead", "engine"), ("model", "engine"), ("show", "kept")):
        assert f"omni.{other}" in own(f"omni.{name}")
    for name in ("answer", "chat", "batch", "lmms"):
        assert "omni.model" in own(f"omni.{name}")
