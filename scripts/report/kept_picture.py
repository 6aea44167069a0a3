"""The picture of README.md: what the stages keep of the shipped clip, on a light page and on a dark one.

    python scripts/report/kept_picture.py         # writes docs/figures/kept-light.png and kept-dark.png

Asks `tiny` at 10 %. From left to right two seconds each, a frame above its sound; what was dropped is covered.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import omni
from omni.arguments import CLIP
from omni.kept import AUDIO, VIDEO, Tile, View, draw_tiles, lay_tiles, read
from omni.processing.frames import vision_sizes

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
QUESTION, RETENTION = "Which sound came first?", 0.10
SIDE, STRIP, GAP, LEFT = 220, 44, 16, 380
"""Pixels: of a frame, of the height of its sound, between them, and left of them for the words."""
INKS = {"light": ("#1f2328", "#59636e", "#eef1f4"), "dark": ("#f0f6fc", "#9198a1", "#21262d")}
"""Of words, of small ones, and of what was dropped: GitHub's own."""


def main() -> None:
    model = omni.load("tiny", device="cpu", dtype=torch.float32)
    clip, question = {"type": "video", "video": str(CLIP)}, {"type": "text", "text": QUESTION}
    inputs = model.prepare([{"role": "user", "content": [clip, question]}])
    prefill = model.prefill(inputs, seats=RETENTION)
    view = read(inputs, prefill)
    tiles, _ = lay_tiles(view, inputs, model.config, 240)
    pictures = draw_tiles(tiles, inputs, model.config, vision_sizes(model.folder, model.config))
    windows: dict[int, dict[int, tuple[Tile, Image.Image]]] = {}
    for tile, picture in zip(tiles, pictures, strict=True):
        windows.setdefault(tile.window, {}).setdefault(tile.kind, (tile, picture))  # the first frame of each
    media = [number for number, stage in enumerate(view.stages) if stage.tokens["video"] + stage.tokens["audio"]]
    shown = [0, 1, media[-1]]
    FOLDER.mkdir(exist_ok=True)
    for name, inks in INKS.items():
        sheet = draw(view, list(windows.values()), shown, inks).quantize(128, Image.Quantize.FASTOCTREE)
        sheet.save(FOLDER / f"kept-{name}.png", optimize=True)


def draw(
    view: View, windows: list[dict[int, tuple[Tile, Image.Image]]], shown: list[int], inks: tuple[str, str, str]
) -> Image.Image:
    ink, small, cover = inks
    row = SIDE + STRIP + 4 + GAP
    sheet = Image.new("RGBA", (LEFT + len(windows) * (SIDE + GAP), len(shown) * row), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    whole = view.stages[0].tokens
    names = ["Every token", "Enter the decoder", view.stages[shown[-1]].name]
    for number, (stage, name) in enumerate(zip(shown, names, strict=True)):
        top, tokens = number * row, view.stages[stage].tokens
        share = (tokens["video"] + tokens["audio"]) / (whole["video"] + whole["audio"])
        pen.text((0, top + 60), name, ink, ImageFont.load_default(34))
        said = f"{tokens['video']} of video, {tokens['audio']} of sound" + ("" if stage == 0 else f": {share:.0%}")
        pen.text((0, top + 110), said, small, ImageFont.load_default(24))
        for column, window in enumerate(windows):
            left = LEFT + column * (SIDE + GAP)
            for kind, high, below in ((VIDEO, SIDE, 0), (AUDIO, STRIP, SIDE + 4)):
                if kind in window:
                    sheet.paste(covered(view, *window[kind], stage, (SIDE, high), cover), (left, top + below))
    return sheet


def covered(view: View, tile: Tile, picture: Image.Image, stage: int, size: tuple[int, int], cover: str) -> Image.Image:
    """A tile at a stage."""
    plain = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    there = view.by_kind[tile.kind][tile.first : tile.first + tile.rows * tile.columns] >= stage
    mask = Image.fromarray((~there).view(tile.rows, tile.columns).byte().mul(235).numpy(), "L")
    return Image.composite(Image.new("RGB", size, cover), plain, mask.resize(size, Image.Resampling.NEAREST))


if __name__ == "__main__":
    main()
