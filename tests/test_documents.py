"""Documents: links lead somewhere, files that are named are there, and commands say what they need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for place in (".", "docs", "benchmarks", "benchmarks/pages") for path in (ROOT / place).glob("*.md")
)
PLACES = "omni|seats|weights|scripts|tests|docs|benchmarks"


def without_blocks(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces, numbers where one is there."""
    found: dict[str, int] = {}
    for heading in re.findall(r"(?m)^#{1,6} (.+)$", without_blocks(path.read_text(encoding="utf-8"))):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[plain] = found.get(plain, -1) + 1
    return {name + (f"-{number}" if number else "") for name, most in found.items() for number in range(most + 1)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Relative ones, pictures among them, and their anchors."""
    text = re.sub(r"`[^`]*`", "", without_blocks(path.read_text(encoding="utf-8")))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for link in links:
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert ROOT in target.resolve().parents, f"{link} leads out of the project"
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path: Path) -> None:
    named = re.findall(rf"(?<![\w/.-])((?:{PLACES})/[\w./-]*\w\.(?:py|md|json|yaml|html|mp4))\b", path.read_text())
    assert [name for name in dict.fromkeys(named) if not (ROOT / name).exists()] == []


def test_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run, what is skipped and why; continuations and here-documents stay whole."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_documents as found

    block = found.Block(
        "a", "sh", "one  # said\n# why\ntwo \\\n  three\ncat <<'END'\n# text\nEND\n# needs a GPU\nfour\n"
    )
    assert [(each.text, each.skipped) for each in found.commands_of(block)] == [
        ("one  # said", ""),
        ("two \\\n  three", ""),
        ("cat <<'END'\n# text\nEND\n", ""),
        ("four", "needs a GPU"),
    ]
    assert found.missing(["a", "…", "b 3 of … s"], "x\na\nmore\nb 3 of 9 s\n") == ""
    assert found.missing(["b", "a"], "a\nb\n") == "a", "in this order"
    texts = [
        command.text
        for path in found.documents()
        for block in found.blocks_of(path)
        for command in found.commands_of(block)
        if not command.skipped
    ]
    assert len(texts) > 15 and not any("Qwen/" in text or "cuda" in text.partition("#")[0] for text in texts)


def test_every_script_is_in_a_document() -> None:
    """Each script that runs by itself is named in a document."""
    said = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for script in sorted((ROOT / "scripts").rglob("*.py")):
        if "__main__" in script.read_text(encoding="utf-8"):
            assert script.relative_to(ROOT).as_posix() in said, script


def test_architecture_names_every_file() -> None:
    """Each file of the packages, by name, by pattern or in a folder; nothing that is not there; `a/b.py`, `c.py` are in
    one folder."""
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Which file to open")[2]
    patterns = []
    for cell in re.findall(r"(?m)^\| (`[^|]+`) \|", table.partition("\n## ")[0]):
        first, *others = re.findall(r"`([^`]+)`", cell)
        folder = first.rstrip("/").rpartition("/")[0]
        patterns += [first, *(other if "/" in other.rstrip("/") else f"{folder}/{other}" for other in others)]
    files = [
        path.relative_to(ROOT)
        for room in ("omni", "seats", "weights", "scripts")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    found = {
        pattern: {file for file in files if file.match(pattern) or f"{file}".startswith(pattern)}
        for pattern in patterns
    }
    assert [pattern for pattern, some in found.items() if not some] == []
    assert [
        f"{file}" for file in files if file.name != "__init__.py" and not any(file in some for some in found.values())
    ] == []
