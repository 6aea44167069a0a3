"""What each stage kept, drawn: a page, a still picture."""

from __future__ import annotations

import base64
import io
import json
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from omni.config import QWEN3
from omni.engine import Prefill
from omni.inputs import InputError, Inputs, part_of
from omni.kept import AUDIO, IMAGE, KINDS, VIDEO, Tile, View, draw_tiles, lay_tiles, read, short
from omni.processing.frames import QWEN3_OMNI_SIZES, VisionSizes
from omni.processing.media.files import named
from omni.processing.media.identity import is_same_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image as Picture

MOST_TILES = {".html": 240, ".png": 96}
"""Windows, frames, pictures and stretches of sound that are drawn at most, of each: more are chosen from evenly."""
JPEG_QUALITY = 70
VEIL, TINT = (12, 14, 20, 214), 90
"""Over what is gone, and how opaque a colour is over what is not."""
KIND_COLOURS = {"text": "#9aa4b2", "image": "#14b8a6", "video": "#3b82f6", "audio": "#f97316"}


@dataclass(frozen=True)
class Page:
    """An HTML page that draws what each stage kept of a prompt, made by `omni.show`; a notebook shows it where it is a
    cell's value. html: the whole page, which needs no other file."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        """In a frame, so that neither the page's styles nor its scripts meet the notebook's."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" title="What each stage kept" '
            'style="width: 100%; height: 50em; border: 0"></iframe>'
        )


@overload
def show(
    inputs: Inputs,
    prefill: Prefill,
    path: str | Path,
    *,
    sizes: VisionSizes | None = None,
    question: str = "",
    answer: str = "",
    settings: str = "",
) -> None: ...


@overload
def show(
    inputs: Inputs,
    prefill: Prefill,
    path: None = None,
    *,
    sizes: VisionSizes | None = None,
    question: str = "",
    answer: str = "",
    settings: str = "",
) -> Page: ...


def show(
    inputs: Inputs,
    prefill: Prefill,
    path: str | Path | None = None,
    *,
    sizes: VisionSizes | None = None,
    question: str = "",
    answer: str = "",
    settings: str = "",
) -> Page | None:
    """Draws what each stage kept: a page where `path` ends with .html, a still picture where with .png; without a path
    the page is returned, which notebooks show.

    prefill: of these inputs. sizes: the checkpoint's (`vision_sizes`), by which its processor made patches; the
    family's unless given. The texts are shown as they are. A file that is there is replaced when the new one is whole.
    Raises InputError for a path that cannot be written or of another ending, for a prefill of other inputs, and where a
    .png is asked for and there is no matplotlib.
    """
    path = None if path is None else check_path(path)
    suffix = ".html" if path is None else path.suffix.lower()
    config, view = prefill.config, read(inputs, prefill)
    if sizes is None:
        sizes = replace(
            QWEN3_OMNI_SIZES if config.family == QWEN3 else VisionSizes(),
            patch_size=config.vision.patch_size,
            merge_size=config.vision.spatial_merge_size,
            temporal_patch_size=config.vision.temporal_patch_size,
        )
    tiles, thinned = lay_tiles(view, inputs, config, MOST_TILES[suffix])
    drawn = list(zip(tiles, draw_tiles(tiles, inputs, config, sizes), strict=True))
    method = "every token kept" if prefill.method is None else str(prefill.method)
    texts = {"question": question, "answer": answer, "settings": "\n".join(filter(None, (settings, method)))}
    content = (page if suffix == ".html" else still)(view, drawn, texts, thinned)
    if path is None:
        return Page(content.decode())
    _write(path, content)
    return None


def check_path(path: str | Path, media: Iterable[Any] = ()) -> Path:
    """For callers that want to know before the work is done. Raises InputError as `show` does for its path, and where
    it is one of these media."""
    path = Path(path)
    for source in media:
        if is_same_file(source, path):
            raise InputError(f"{path} would be written over {named(source)}: name another file.")
    if path.suffix.lower() not in (".html", ".png"):
        raise InputError(f"{path}: what each stage kept is written as .html or .png.")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a file in it.")
        if not path.parent.is_dir():
            raise InputError(f"{path} cannot be written: there is no folder {path.parent}.")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None
    if path.suffix.lower() == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError(
                f"{path}: a still picture needs matplotlib (pip install 'seats-omni[plot]'); .html does not."
            ) from None
    return path


def page(view: View, drawn: Sequence[tuple[Tile, Picture]], texts: dict[str, str], thinned: str) -> bytes:
    """One file that needs no other: the template `show.html` with all that it draws as JSON."""
    data = {
        **texts,
        "layers": view.num_layers,
        "macs": view.macs,
        "fullMacs": view.full_macs,
        "stages": [
            {
                "name": stage.name,
                "layers": stage.layers,
                "tokens": stage.tokens,
                "macs": stage.macs,
                "fullMacs": stage.full_macs,
                "heat": None if stage.scores is None else _base64(heat(view, stage.scores).numpy().tobytes()),
            }
            for stage in view.stages
        ],
        "fates": view.fates,
        "colours": view.colours,
        "kinds": "".join("tiva"[kind] for kind in view.kind.tolist()),
        "reach": view.reach.tolist(),
        "windows": [
            {"video": [video.start, len(video)], "audio": [audio.start, len(audio)]} for video, audio in view.windows
        ],
        "thinned": thinned,
        "tiles": [
            {
                "kind": KINDS[tile.kind],
                "number": tile.number,
                "seconds": tile.seconds,
                "first": tile.first,
                "rows": tile.rows,
                "columns": tile.columns,
                "window": tile.window,
                "size": picture.size,
                "picture": "data:image/jpeg;base64," + _base64(_jpeg(picture)),
            }
            for tile, picture in drawn
        ],
    }
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":  # texts come from outside: none may end the script or begin another
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = files("omni").joinpath("show.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", text).encode()


def heat(view: View, scores: Tensor) -> Tensor:
    """(S,) uint8: the rank of each score among those of its kind, 1 to 255, the highest last; 0 where there is none.

    Ranks, since a few tokens have nearly all of the attention. Text, which is not chosen from, has none.
    """
    levels = torch.zeros(len(scores), dtype=torch.uint8)
    for kind in (VIDEO, AUDIO):
        at = ((view.kind == kind) & ~scores.isnan()).nonzero().flatten()
        ranks = scores[at].argsort(stable=True).argsort()
        levels[at] = (1 + ranks * 254 // max(1, len(at) - 1)).byte()
    return levels


def still(view: View, drawn: Sequence[tuple[Tile, Picture]], texts: dict[str, str], thinned: str) -> bytes:
    """The page as one PNG: frames and sound by how far each token came, budgets and tokens by layer."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sheet = contact_sheet(view, drawn)
    paragraphs = [*(f"{name}: {' '.join(text.split())}" for name, text in texts.items() if text), thinned]
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 150, max_lines=4)]

    # In inches from the top left: heads of charts and the sheet's legend need room that no layout leaves by itself.
    width, left, chart, head = 12.0, 0.8, 2.9, 0.6 + 0.17 * len(lines)
    seen = width - left - 0.3
    if sheet is not None:
        seen = min(seen, sheet.width / 130)  # a small one is not blown up
    below = head + 0.3 + chart + 1.0
    height = below if sheet is None else below + seen * sheet.height / sheet.width + 0.2
    figure = Figure(figsize=(width, height), dpi=130)

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    def write(y: float, text: str, **font: Any) -> None:
        figure.text(left / width, 1 - y / height, text, va="top", parse_math=False, **font)

    write(0.15, "What each stage kept", fontsize=13, fontweight="bold")
    write(0.5, "\n".join(lines), fontsize=8, linespacing=1.5)
    _draw_flow(place(left, head + 0.3, 5.1, chart), view)
    _draw_budgets(place(left + 5.8, head + 0.3, 5.1, chart), view)
    if sheet is not None:
        axes = place(left, below, seen, seen * sheet.height / sheet.width)
        axes.axis("off")
        axes.imshow(np.asarray(sheet), interpolation="lanczos", aspect="auto")
        counts = torch.bincount(torch.cat(view.by_kind[VIDEO:]), minlength=len(view.fates)).tolist()
        fates = zip(view.fates, view.colours, counts, strict=True)
        handles = [Patch(color=colour, label=f"{fate}: {count:,}") for fate, colour, count in fates if count]
        if handles:
            axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=7.5, frameon=False)
    written = io.BytesIO()
    with _one_at_a_time, warnings.catch_warnings():  # which warnings are ignored is the same for all threads
        # Scripts that the plot's font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(written, format="png")
    return written.getvalue()


_one_at_a_time = Lock()


def contact_sheet(view: View, drawn: Sequence[tuple[Tile, Picture]]) -> Picture | None:
    """Windows in rows, the frames of each above its sound; None without media. RGB, 1800 pixels wide at most."""
    side, gap, width = 132, 8, 1800
    blocks: list[Picture] = []
    for _, group in groupby(sorted(drawn, key=lambda each: each[0].window), key=lambda each: each[0].window):
        tiles = list(group)
        seen = [_tinted(view, tile, picture, side) for tile, picture in tiles if tile.kind != AUDIO]
        room = max(side, min(width, sum(picture.width + 2 for picture in seen)))
        heard = [(tile, picture) for tile, picture in tiles if tile.kind == AUDIO]
        # A sound without frames is as wide as it is long.
        strips = [
            _tinted(view, tile, picture, 30, room if seen else min(width, 6 * tile.columns)) for tile, picture in heard
        ]
        blocks.append(_shelves([_shelves(seen, room, 2), *strips] if seen else strips, width if not seen else room, 2))
    return _shelves(blocks, width, gap) if blocks else None


def _shelves(pictures: Sequence[Picture], width: int, gap: int) -> Picture:
    """Pictures from left to right, in rows no wider than `width` where each is not, on white."""
    from PIL import Image

    at, x, y, row = [], 0, 0, 0
    for picture in pictures:
        if x and x + picture.width > width:
            x, y, row = 0, y + row + gap, 0
        at.append((x, y))
        x, row = x + picture.width + gap, max(row, picture.height)
    right = max(left + picture.width for (left, _), picture in zip(at, pictures, strict=True))
    whole = Image.new("RGB", (right, y + row), "white")
    for place, picture in zip(at, pictures, strict=True):
        whole.paste(picture, place)
    return whole


def _tinted(view: View, tile: Tile, picture: Picture, height: int, width: int | None = None) -> Picture:
    """A tile with every token in the colour of its fate, dark where it was dropped first. Pictures are plain."""
    from PIL import Image, ImageColor

    width = width or max(1, round(picture.width * height / picture.height))
    plain = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if tile.kind == IMAGE:
        return plain
    reach = view.by_kind[tile.kind][tile.first : tile.first + tile.rows * tile.columns]
    tints = torch.tensor([(*ImageColor.getrgb(colour), TINT) for colour in view.colours], dtype=torch.uint8)
    if len(tints) > 1:
        tints[0] = torch.tensor(VEIL, dtype=torch.uint8)
    else:
        tints[0, 3] = 0  # nothing was selected
    veil = Image.fromarray(tints[reach].view(tile.rows, tile.columns, 4).contiguous().numpy(), "RGBA")
    veil = veil.resize((width, height), Image.Resampling.NEAREST)
    return Image.alpha_composite(plain.convert("RGBA"), veil).convert("RGB")


def _draw_flow(axes: Axes, view: View) -> None:
    """Tokens by layer, stacked by kind, under the line of every token."""
    whole = view.stages[0].total
    edges = [stage.layers[0] for stage in view.stages if stage.macs] + [view.num_layers]
    below = [0] * (len(edges) - 1)
    for kind in KINDS:
        counts = [stage.tokens[kind] for stage in view.stages if stage.macs]
        if not view.stages[0].tokens[kind]:
            continue
        tops = [low + count for low, count in zip(below, counts, strict=True)]
        axes.stairs(tops, edges, baseline=below, fill=True, color=KIND_COLOURS[kind], label=kind)
        below = tops
    axes.hlines(whole, 0, view.num_layers, linestyles="dashed", color="0.4", label="every token")
    axes.set(xlabel="decoder layer", ylabel="tokens", xlim=(0, view.num_layers), ylim=(0, whole * 1.3))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=len(KINDS) + 1, loc="upper left")
    fewer = f" of {short(view.full_macs)}, {view.full_macs / view.macs:.1f} times fewer"
    title = f"{short(view.macs)} multiply-accumulates{fewer if len(view.stages) > 1 else ''}"
    axes.set_title(title, fontsize=9, loc="left")


def _draw_budgets(axes: Axes, view: View) -> None:
    """Tokens that entered the decoder, by window, and of these what came up to the last selection."""
    from matplotlib.ticker import MaxNLocator

    media = [number for number, stage in enumerate(view.stages) if stage.tokens["video"] + stage.tokens["audio"]]
    if not view.windows or not media:
        axes.axis("off")
        return
    numbers = range(1, len(view.windows) + 1)
    for stage, alpha in ((min(1, len(view.stages) - 1), 0.35), (media[-1], 1.0)):
        name = view.stages[stage].name.lower()
        # Audio downwards, so that neither hides the other.
        for kind, way, counts in zip(KINDS[VIDEO:], (1, -1), zip(*view.window_counts(stage), strict=True), strict=True):
            if any(counts):
                bars = [way * count for count in counts]
                axes.bar(numbers, bars, width=1, color=KIND_COLOURS[kind], alpha=alpha, label=f"{kind}, {name}")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    low, high = axes.get_ylim()
    axes.set_xlim(0, len(view.windows) + 1)
    axes.tick_params(labelsize=8)
    axes.set(xlabel="window", ylabel="tokens: audio | video", ylim=(low, high + 0.35 * (high - low)))
    axes.set_title("Budget of each window", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")


def _write(path: Path, content: bytes) -> None:
    """Under another name first: nobody finds half a file."""
    part = part_of(path)
    try:
        part.write_bytes(content)
        part.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        with suppress(OSError, ValueError):
            part.unlink()


def _jpeg(picture: Picture) -> bytes:
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return written.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
