"""What is drawn of a prefill is what it kept: the page's data, its pixels in a browser, the still."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kept import MEDIA, MIXED, SETTINGS
from test_stages import LAYERS, REQUESTS

import omni
from omni.inputs import InputError
from omni.kept import explain
from omni.show import MOST_TILES, show
from seats.method import Method
from seats.methods import method_for
from tests.omni.pairs import FAMILIES, Pair, make_request

MINUTE = [("text", 12), ("video", 60, 24, 24, 1.0, 6000), ("text", 12)]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": LAYERS, "max_position_embeddings": 16384})


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def shown(
    pair: Pair, inputs: omni.Inputs, path: Path, seats: Method | None = SETTINGS, **texts: str
) -> tuple[omni.Prefill, dict[str, Any]]:
    prefill = pair.model.prefill(inputs, seats=seats)
    show(inputs, prefill, path, **texts)
    return prefill, data_of(path) if path.suffix == ".html" else {}


@pytest.mark.parametrize("name", MEDIA)
def test_the_page_says_what_was_kept(pair: Pair, name: str, tmp_path: Path) -> None:
    """Every token's reach, the counts of every stage, the costs, the ranks: exactly those of the prefill."""
    inputs = make_request(pair, MEDIA[name])
    prefill, data = shown(pair, inputs, tmp_path / "kept.html")
    reach, kinds = data["reach"], data["kinds"]
    assert len(reach) == len(kinds) == inputs.input_ids.shape[1]
    for step, kept in enumerate(prefill.kept):
        assert [place for place, last in enumerate(reach) if last > step] == kept.tolist()
    tokens = pair.model.config.token_ids
    for letter, token in (("i", tokens.image), ("v", tokens.video), ("a", tokens.audio)):
        assert [kind == letter for kind in kinds] == (inputs.input_ids[0] == token).tolist()
    totals = [sum(stage["tokens"].values()) for stage in data["stages"]]
    assert totals == ([len(reach), *prefill.segments] if prefill.kept else prefill.segments)
    assert [stage["tokens"]["audio"] for stage in data["stages"]] == [
        sum(kind == "a" and last >= stage for kind, last in zip(kinds, reach, strict=True))
        for stage in range(len(totals))
    ]
    head = pair.model.config.decoder.hidden_size * pair.model.config.decoder.vocab_size
    assert sum(stage["macs"] for stage in data["stages"]) + totals[-1] * head == prefill.macs == data["macs"]
    assert sum(stage["fullMacs"] for stage in data["stages"]) + len(reach) * head == prefill.full_macs
    for scores, before, stage in zip(prefill.relevance, prefill.kept, data["stages"][2:], strict=False):
        assert (scores is None) == (stage["heat"] is None)
        if scores is None:
            continue
        levels = base64.b64decode(stage["heat"])
        media = [place for place in before.tolist() if kinds[place] in "va"]
        assert [place for place, level in enumerate(levels) if level] == media
        by_place = dict(zip(before.tolist(), scores.tolist(), strict=True))
        for letter in "va":
            ranked = sorted((by_place[place], levels[place]) for place in media if kinds[place] == letter)
            assert [level for _, level in ranked] == sorted(level for _, level in ranked)


def test_every_token_has_a_place(pair: Pair, tmp_path: Path) -> None:
    """Tiles and windows each hold every video and audio token once, in order; a window is a pair of runs."""
    inputs = make_request(pair, MIXED)
    _, data = shown(pair, inputs, tmp_path / "kept.html")
    for kind in ("video", "audio", "image"):
        covered = [
            place
            for tile in data["tiles"]
            if tile["kind"] == kind
            for place in range(tile["first"], tile["first"] + tile["rows"] * tile["columns"])
        ]
        assert covered == list(range(data["kinds"].count(kind[0])))
    for kind in ("video", "audio"):
        runs = [len(run) for run in re.findall(f"{kind[0]}+", data["kinds"])]
        assert [count for _, count in (window[kind] for window in data["windows"]) if count] == runs
        assert [window[kind][0] for window in data["windows"]][: len(runs)] == [sum(runs[:n]) for n in range(len(runs))]
        for tile in data["tiles"]:
            if tile["kind"] == kind:
                first, count = data["windows"][tile["window"]][kind]
                assert first <= tile["first"] + tile["rows"] * tile["columns"] // 2 < first + count
    assert data["thinned"] == ""


@pytest.mark.parametrize("seats", [None, SETTINGS])
@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_nothing_selected(pair: Pair, seats: Method | None, suffix: str, tmp_path: Path) -> None:
    """Text alone, and a clip of which every token is kept: one stage."""
    for parts in [[("text", 9)], *([MIXED] if seats is None else [])]:
        prefill, data = shown(pair, make_request(pair, parts), tmp_path / f"kept{suffix}", seats)
        if data:
            assert [stage["name"] for stage in data["stages"]] == ["All tokens"]
            assert data["macs"] == data["fullMacs"] == prefill.macs


@pytest.mark.parametrize("name", ["fastv-om", "dycoke", "random"])
def test_other_methods(pair: Pair, name: str, tmp_path: Path) -> None:
    inputs = make_request(pair, REQUESTS["clip with sound"])
    method = method_for(name, pair.model.config, 0.6)
    prefill, data = shown(pair, inputs, tmp_path / "kept.html", method)
    for step, kept in enumerate(prefill.kept):
        assert [place for place, last in enumerate(data["reach"]) if last > step] == kept.tolist()
    assert data["settings"] == str(method)


HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> & $x_{1}$ \u2028 什么"


def test_texts_stay_text(pair: Pair, tmp_path: Path) -> None:
    """What a question or an answer says comes back as it was, and is nowhere markup."""
    path = tmp_path / "kept.html"
    inputs = make_request(pair, REQUESTS["sound"])
    _, data = shown(pair, inputs, path, question=HOSTILE, answer=HOSTILE, settings=HOSTILE)
    assert data["question"] == data["answer"] == HOSTILE
    assert data["settings"].startswith(HOSTILE + "\nSeatsConfig(")
    text = path.read_text()
    assert text.count("<script") == 2 and "<img" not in text and "onerror" in text
    assert "http" not in text.replace("http-equiv", "")
    shown(pair, inputs, tmp_path / "kept.png", question=HOSTILE, answer=HOSTILE)


def test_a_minute_is_small(pair: Pair, tmp_path: Path) -> None:
    """The worst there is, frames of noise: under 5 MB."""
    inputs = make_request(pair, MINUTE)
    inputs.pixel_values_videos.clamp_(-1.7, 1.9)
    path = tmp_path / "kept.html"
    _, data = shown(pair, inputs, path)
    assert sum(tile["kind"] == "video" for tile in data["tiles"]) == 60
    assert path.stat().st_size < 5e6


def test_long_clips_are_thinned_and_say_so(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly chosen windows, with their frames and sound; reach and budgets are of all."""
    monkeypatch.setitem(MOST_TILES, ".html", 4)
    inputs = make_request(pair, [("text", 5), ("video", 20, 4, 4, 2.0, 4000), ("image", 4, 4), ("text", 4)])
    _, data = shown(pair, inputs, tmp_path / "kept.html")
    windows = len(data["windows"])
    assert windows >= 10
    sounds = len(re.findall("a+", data["kinds"]))
    parts = [f"4 of {windows} windows", "4 of 20 frames", f"4 of {sounds} stretches of sound"]
    assert data["thinned"].startswith(f"Evenly chosen: {', '.join(parts)}.")
    chosen = sorted({tile["window"] for tile in data["tiles"] if tile["kind"] == "video"})
    assert len(chosen) == 4 and chosen[0] == 0 and chosen[-1] >= windows / 2
    assert {tile["window"] for tile in data["tiles"] if tile["kind"] == "audio"} <= set(chosen)
    assert len(data["reach"]) == inputs.input_ids.shape[1]
    many = make_request(pair, [("text", 5), *[("image", 4, 4)] * 9, ("text", 4)])
    _, data = shown(pair, many, tmp_path / "kept.html")
    assert data["thinned"].startswith("Evenly chosen: 4 of 9 pictures.")


@pytest.mark.parametrize("name", MEDIA)
def test_a_still(pair: Pair, name: str, tmp_path: Path) -> None:
    from PIL import Image

    pytest.importorskip("matplotlib")
    path = tmp_path / "kept.png"
    shown(pair, make_request(pair, MEDIA[name]), path, question="$5 and $6?")
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 400
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (0x3B, 0x82, 0xF6) in colours or "clip" not in name


def test_what_cannot_be_written(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error each; a file that was there stays, and nothing is left beside it."""
    inputs = make_request(pair, REQUESTS["sound"])
    prefill = pair.model.prefill(inputs, seats=SETTINGS)

    def attempt(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            show(inputs, prefill, path)

    attempt(tmp_path / "kept.txt", r"kept.txt: what each stage kept is written as .html or .png")
    attempt(tmp_path / "missing" / "kept.html", "there is no folder .*missing")
    (tmp_path / "folder.html").mkdir()
    attempt(tmp_path / "folder.html", "is a folder")
    (tmp_path / "folder.html").rmdir()
    attempt(tmp_path / f"{'long' * 80}.html", "cannot be written: File name too long")
    attempt(tmp_path / "nothing\0.html", "cannot be written: embedded null byte")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        attempt(tmp_path / "kept.png", r"needs matplotlib \(pip install")
    assert not list(tmp_path.iterdir())

    path = tmp_path / "kept.html"
    path.write_text("the one before")
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        attempt(path, "kept.html cannot be written: No space left on device")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["the one before"]
    show(inputs, prefill, str(path))
    assert data_of(path)["reach"]


def test_another_prefill_is_refused(pair: Pair, tmp_path: Path) -> None:
    inputs = make_request(pair, REQUESTS["clip with sound"])
    prefill = pair.model.prefill(inputs, seats=SETTINGS)
    for call in (lambda other: show(other, prefill, tmp_path / "kept.html"), lambda other: explain(other, prefill)):
        with pytest.raises(InputError, match="the prefill is of a prompt of"):
            call(make_request(pair, REQUESTS["sound"]))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    quiet = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run"
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=quiet.split())
        yield started
        started.close()


def test_in_a_browser(pair: Pair, browser: Any, tmp_path: Path) -> None:
    """No errors and no request; keys and buttons move through the stages; of a white clip what a stage kept is
    lighter on the screen than what it dropped, and in relevance's colours the first is hotter than the last."""
    from PIL import Image

    inputs = make_request(pair, [("text", 5), ("video", 5, 12, 16, 1.0, 530), ("text", 4)])
    inputs.pixel_values_videos.mul_(0.1).add_(1.5)
    path = tmp_path / "kept.html"
    prefill, data = shown(pair, inputs, path, question=HOSTILE, answer=HOSTILE)
    errors: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.locator("dd.question").inner_text() == HOSTILE.strip()

    tile = next(each for each in data["tiles"] if each["kind"] == "video" and each["window"] == 1)
    drawn = page.locator(".window").nth(1).locator(".frames .tile").first
    places = [place for place, kind in enumerate(data["kinds"]) if kind == "v"]
    places = places[tile["first"] : tile["first"] + tile["rows"] * tile["columns"]]

    def lights() -> list[int]:
        """The grey of every token's middle on the screen."""
        with Image.open(io.BytesIO(drawn.screenshot())) as picture:
            grey = picture.convert("L")
        width, height = grey.width / tile["columns"], grey.height / tile["rows"]
        middles = [((x + 0.5) * width, (y + 0.5) * height) for y in range(tile["rows"]) for x in range(tile["columns"])]
        return [grey.getpixel((int(x), int(y))) for x, y in middles]

    before, there_before = lights(), [True] * len(places)
    for stage, kept in enumerate(prefill.kept, start=1):
        page.keyboard.press("ArrowRight")
        status = page.locator("[role=status]").inner_text()
        assert status.startswith(f"{data['stages'][stage]['name']}: {len(kept)} of ")
        assert page.locator("#stages input").nth(stage).is_checked()
        there = torch.isin(torch.tensor(places), kept).tolist()
        now = lights()
        assert (now != before) == (there != there_before)
        if any(there) and not all(there):
            lit = [light for light, is_kept in zip(now, there, strict=True) if is_kept]
            dark = [light for light, is_kept in zip(now, there, strict=True) if not is_kept]
            assert min(lit) > 2 * max(dark)
        shown_count = int(drawn.locator("img").get_attribute("alt").split(": ")[1].split(" of ")[0])
        assert shown_count == sum(there)
        before, there_before = now, there
    page.keyboard.press("ArrowRight")  # at the end: stays

    page.locator("#stages label").nth(2).click()
    page.locator("input[value=heat]").check(force=True)
    levels = base64.b64decode(data["stages"][2]["heat"])
    of = sorted((levels[place], light) for place, light in zip(places, lights(), strict=True) if levels[place])
    assert of[-1][1] > of[0][1]
    page.locator("#stages input").nth(2).press("ArrowLeft")  # the radio buttons' own keys
    assert page.locator("#stages input").nth(1).is_checked()
    page.locator("#windows summary").click()
    page.locator("#windows tbody tr").first.wait_for()
    assert page.locator("#windows tbody tr").count() == len(data["windows"])
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not errors
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    page.close()


def test_without_a_path_it_is_a_cells_value(pair: Pair, tmp_path: Path) -> None:
    """The page that a path would get, in a frame of its own."""
    inputs = make_request(pair, REQUESTS["clip with sound"])
    prefill = pair.model.prefill(inputs, seats=SETTINGS)
    question = 'Is "this" <b>bold</b>?'
    page = omni.show(inputs, prefill, question=question)
    assert show(inputs, prefill, tmp_path / "kept.html", question=question) is None
    assert page.html == (tmp_path / "kept.html").read_text()
    frame = page._repr_html_()
    assert frame.startswith('<iframe srcdoc="') and 'sandbox="allow-scripts"' in frame
    assert frame.count("<") == 2  # all of the page is escaped
    assert html.unescape(frame.split('"')[1]) == page.html
    assert repr(page) == "Page()"
