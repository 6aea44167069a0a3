"""What each stage of a prefill kept, to look at: a page, a still picture, a table in plain text."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from einops import rearrange
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.engine import Prefill
from omni.inputs import InputError, Inputs
from omni.processing.frames import QWEN3_OMNI_SIZES, VisionSizes
from omni.processing.positions import layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image as Picture

T = TypeVar("T")

KINDS = ("text", "image", "video", "audio")
"""Kinds of token; a token's kind is an index into these."""
TEXT, IMAGE, VIDEO, AUDIO = range(len(KINDS))

MOST_TILES = {".html": 240, ".png": 96}
"""Windows, frames, pictures and stretches of sound that are drawn at most, of each: more are chosen from evenly."""
TILE_PIXELS, ALL_PIXELS = 256**2, 64 * 256**2
"""Pixels of a thumbnail, and of all together, at most. Of pure noise, the worst there is, they take 2 MB in a page."""
STRIP_TOKENS, STRIP_WIDTH, STRIP_HEIGHT = 150, 3, 40
"""Audio tokens in a stretch of sound at most; pixels to a token, and of the height."""
JPEG_QUALITY = 70
TABLE_WINDOWS = 40
"""Windows in the plain table at most."""

GONE, STOPS = "#64748b", ("#8b5cf6", "#0ea5e9", "#22c55e", "#facc15")
"""Colours of tokens that did not enter the decoder, and of those that did, from the first drop to the last."""
VEIL, TINT = (12, 14, 20, 214), 90
"""Over what is gone, and how opaque a colour is over what is not."""
KIND_COLOURS = {"text": "#9aa4b2", "image": "#14b8a6", "video": "#3b82f6", "audio": "#f97316"}


@dataclass(frozen=True)
class Stage:
    """What is left of a prompt at one point of the prefill.

    layers: of the decoder, that see these tokens: first, from 0, and one past the last; none of the encoders' output.
    tokens: by kind. macs, full_macs: multiply-accumulates of these layers, and what they take with every token.
    scores: (S,) float32, the relevance by which the step chose, NaN where a token was not there; None without.
    """

    name: str
    layers: tuple[int, int]
    tokens: dict[str, int]
    macs: int
    full_macs: int
    scores: Tensor | None = None

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


@dataclass(frozen=True)
class View:
    """A prefill in terms of its prompt. Numbers of tokens are counted in the order of the prompt.

    kind: (S,) of each token. reach: (S,) the last stage at which it is there, an index into `stages`. windows: of each,
    its video tokens and its audio tokens, ranges among those of their kind: inside a clip the i-th run of adjacent
    video tokens and the i-th of audio, one of them empty where the other has no partner. fates: what became of tokens
    of each reach. macs, full_macs: the head included.
    """

    kind: Tensor
    reach: Tensor
    stages: list[Stage]
    windows: list[tuple[range, range]]
    fates: list[str]
    num_layers: int
    macs: int
    full_macs: int

    @cached_property
    def by_kind(self) -> list[Tensor]:
        """(n,) reach of the tokens of each kind."""
        return [self.reach[self.kind == kind] for kind in range(len(KINDS))]

    def window_counts(self, stage: int) -> list[tuple[int, int]]:
        """Video and audio tokens of each window that are there at a stage."""
        there = [
            [0, *(self.by_kind[kind] >= stage).cumsum(0).tolist()]  # sums up to a token: a window is a difference
            for kind in (VIDEO, AUDIO)
        ]
        return [
            (there[0][video.stop] - there[0][video.start], there[1][audio.stop] - there[1][audio.start])
            for video, audio in self.windows
        ]

    @property
    def colours(self) -> list[str]:
        """One per fate: the later a token was dropped, the brighter."""
        if len(self.fates) == 1:
            return [STOPS[-1]]
        # Text alone lives through a late removal: then the brightest is what came up to it.
        last = max((int(reach.max()) for reach in self.by_kind[VIDEO:] if len(reach)), default=1)
        return [GONE, *(_blend(min(1.0, (reach - 1) / max(1, last - 1))) for reach in range(1, len(self.fates)))]


@dataclass(frozen=True)
class Tile:
    """A frame, a picture or a stretch of sound as it is drawn, of rows × columns tokens.

    kind: its tokens' kind. number: which of the prompt's clips, pictures or sounds it is of, from 0. seconds: from and
    to, in its medium. first: its first token among those of its kind. window: -1 for pictures.
    """

    kind: int
    number: int
    seconds: tuple[float, float]
    first: int
    rows: int
    columns: int
    window: int


@dataclass(frozen=True)
class Page:
    """What each stage kept, as a page of its own; a notebook shows it where it is a cell's value."""

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


def check_path(path: str | Path) -> Path:
    """For callers that want to know before the work is done. Raises InputError as `show` does for its path."""
    path = Path(path)
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


def explain(inputs: Inputs, prefill: Prefill) -> str:
    """The same as a table in plain text: tokens and multiply-accumulates by stage, tokens by window.

    Arguments and errors: `show`.
    """
    view = read(inputs, prefill)
    shown = [kind for kind in KINDS if view.stages[0].tokens[kind]]
    rows = [["stage", "layers", "tokens", "left", *shown, "multiply-acc.", "every token"]]
    for stage in view.stages:
        tokens = [_with_share(stage.tokens[kind], view.stages[0].tokens[kind]) for kind in shown]
        costs = [_short(stage.macs), _short(stage.full_macs)] if stage.macs else ["", ""]
        share = _share(stage.total, view.stages[0].total)
        rows.append([stage.name, _span(stage.layers), f"{stage.total:,}", share, *tokens, *costs])
    rows.append(["all, with the head", *[""] * (3 + len(shown)), _short(view.macs), _short(view.full_macs)])
    fewer = f"{view.full_macs / view.macs:.2f} times fewer multiply-accumulates than with every token"
    text = [_table(rows), fewer if len(view.stages) > 1 else "every token kept"]
    if view.windows and len(view.stages) > 1:
        counts = [view.window_counts(stage) for stage in range(len(view.stages))]
        rows = [["window", *(stage.name for stage in view.stages)]]
        for number in _spread(range(len(view.windows)), TABLE_WINDOWS):
            rows.append([str(number + 1), *("{} + {}".format(*count[number]) for count in counts)])
        most = len(view.windows)
        some = f", {TABLE_WINDOWS} of {most} windows" if most > TABLE_WINDOWS else ""
        text += ["", f"video + audio tokens by window{some}", _table(rows)]
    return "\n".join(text)


def read(inputs: Inputs, prefill: Prefill) -> View:
    """Which token came how far, and what that cost. Errors: `show`."""
    config = prefill.config
    places = layout(inputs, config)
    length = places.positions.shape[1]
    if prefill.tokens != places.counts:
        raise InputError(f"the prefill is of a prompt of {prefill.tokens} tokens, the inputs are {places.counts}.")
    kind = torch.full((length,), TEXT)
    kind[places.image], kind[places.video], kind[places.audio] = IMAGE, VIDEO, AUDIO
    reach = torch.zeros(length, dtype=torch.long)
    for kept in prefill.kept:  # each step keeps some of what the one before it kept
        reach[kept] += 1

    depth = config.decoder.num_layers
    steps = [] if prefill.method is None else prefill.method.steps(depth)
    names, fates = ["All tokens"], ["kept to the end"]
    if prefill.kept:
        names, fates = [*names, "Before the decoder"], ["dropped before the decoder", *fates]
    for step in steps:
        late = step.video is None
        names.append(f"Late removal, after layer {step.layer}" if late else f"After layer {step.layer}")
        fates.insert(-1, "kept until late removal" if late else f"dropped after layer {step.layer}")
    ends = [0, *(step.layer for step in steps), depth] if prefill.kept else [depth]
    spans = [(0, 0), *pairwise(ends)] if prefill.kept else [(0, depth)]
    scored = [None, None, *prefill.relevance] if prefill.kept else [None]
    stages = []
    for number, (name, layers, scores) in enumerate(zip(names, spans, scored, strict=True)):
        spread = None
        if scores is not None:
            spread = torch.full((length,), math.nan)
            spread[prefill.kept[number - 2]] = scores.cpu().float()
        there = [int(((kind == each) & (reach >= number)).sum()) for each in range(len(KINDS))]
        stages.append(
            Stage(
                name=name,
                layers=layers,
                tokens=dict(zip(KINDS, there, strict=True)),
                macs=config.decoder.macs(sum(there), layers=layers[1] - layers[0]),
                full_macs=config.decoder.macs(length, layers=layers[1] - layers[0]),
                scores=spread,
            )
        )
    return View(kind, reach, stages, _windows(kind, places.clip), fates, depth, prefill.macs, prefill.full_macs)


def _windows(kind: Tensor, clip: Tensor) -> list[tuple[range, range]]:
    """As `seats.selection.windows_of` makes them of the whole prompt."""
    windows: list[tuple[range, range]] = []
    ends = {VIDEO: 0, AUDIO: 0}
    for _, tokens in groupby(zip(clip.tolist(), kind.tolist(), strict=True), key=lambda token: token[0]):
        runs: dict[int, list[range]] = {VIDEO: [], AUDIO: []}
        for each, run in groupby(each for _, each in tokens):
            if each in runs:
                start, ends[each] = ends[each], ends[each] + len(list(run))
                runs[each].append(range(start, ends[each]))
        count = max(map(len, runs.values()))
        for each, found in runs.items():  # what is left over is a window without the other kind
            found.extend([range(ends[each], ends[each])] * (count - len(found)))
        windows += zip(runs[VIDEO], runs[AUDIO], strict=True)
    return windows


def lay_tiles(view: View, inputs: Inputs, config: OmniConfig, most: int) -> tuple[list[Tile], str]:
    """The tiles that are drawn, at most so many of each, and a sentence on what is not; empty where all are."""
    merge = config.vision.spatial_merge_size
    tiles: dict[int, list[Tile]] = {IMAGE: [], VIDEO: [], AUDIO: []}
    # Where the video of each window ends; a frame spread over several is shown where its middle is.
    ends = torch.tensor([video.stop for video, _ in view.windows])
    for kind, grid_thw in ((IMAGE, inputs.image_grid_thw), (VIDEO, inputs.video_grid_thw)):
        first = 0
        for number, (grids, height, width) in enumerate([] if grid_thw is None else grid_thw.tolist()):
            seconds = float(inputs.video_second_per_grid[number]) if inputs.video_second_per_grid is not None else 0.0
            rows, columns = height // merge, width // merge
            for grid in range(grids):
                middle = first + rows * columns // 2
                window = int(torch.searchsorted(ends, middle, right=True)) if kind == VIDEO else -1
                span = (grid * seconds, (grid + 1) * seconds) if kind == VIDEO else (0.0, 0.0)
                tiles[kind].append(Tile(kind, number, span, first, rows, columns, window))
                first += rows * columns
    starts = list(accumulate((config.audio.token_count(n) for n in inputs.mel_lengths.tolist()), initial=0))
    for window, (_, audio) in enumerate(view.windows):
        number = max(index for index, start in enumerate(starts) if start <= audio.start)
        for first in range(audio.start, audio.stop, STRIP_TOKENS):
            count = min(STRIP_TOKENS, audio.stop - first)
            spans = audio_spans(first - starts[number], count, int(inputs.mel_lengths[number]), config)
            span = (spans[0][0] / 100, spans[-1][1] / 100)
            tiles[AUDIO].append(Tile(AUDIO, number, span, first, 1, count, window))

    # Windows are chosen first, those with a frame before others, so that what is drawn belongs together.
    having = sorted({tile.window for tile in tiles[VIDEO]}) or list(range(len(view.windows)))
    wanted = range(len(view.windows)) if len(view.windows) <= most else having
    windows = set(_spread(wanted, most))
    chosen: list[Tile] = []
    of = {"windows": (len(windows), len(view.windows))}
    for kind, name in ((IMAGE, "pictures"), (VIDEO, "frames"), (AUDIO, "stretches of sound")):
        some = _spread([tile for tile in tiles[kind] if tile.window in windows or kind == IMAGE], most)
        of[name] = len(some), len(tiles[kind])
        chosen += some
    fewer = [f"{some:,} of {every:,} {name}" for name, (some, every) in of.items() if some < every]
    return chosen, f"Evenly chosen: {', '.join(fewer)}. Counts and charts are of all." if fewer else ""


def audio_spans(first: int, count: int, mel_frames: int, config: OmniConfig) -> list[tuple[int, int]]:
    """The mel frames, from and to, that become each of `count` tokens of a sound of `mel_frames`, from `first` on."""
    audio = config.audio
    # Both encoders go by chunks; strided convolutions halve a chunk twice or three times.
    stride, per_chunk = 8 if audio.conv_channels else 4, audio.token_count(audio.chunk_frames)
    spans = []
    for token in range(first, first + count):
        chunk, inside = divmod(token, per_chunk)
        begin = chunk * audio.chunk_frames
        end = min(begin + (inside + 1) * stride, begin + audio.chunk_frames, mel_frames)
        spans.append((begin + inside * stride, end))
    return spans


def draw_tiles(tiles: Sequence[Tile], inputs: Inputs, config: OmniConfig, sizes: VisionSizes) -> list[Picture]:
    """What the model saw and heard, small: RGB frames and pictures, grey log-mel with low pitches below."""
    seen = sum(tile.kind != AUDIO for tile in tiles)
    pixels = min(TILE_PIXELS, ALL_PIXELS // max(1, seen))
    # Silence stays dark. Once for each sound: an hour of it is read whole.
    loudest = {
        tile.number: max(0.5, float(inputs.input_features[tile.number, :, : inputs.mel_lengths[tile.number]].max()))
        for tile in {tile.number: tile for tile in tiles if tile.kind == AUDIO}.values()
        if inputs.input_features is not None
    }
    return [
        _mel_strip(tile, inputs, config, loudest[tile.number])
        if tile.kind == AUDIO
        else _frame(tile, inputs, sizes, pixels)
        for tile in tiles
    ]


def _frame(tile: Tile, inputs: Inputs, sizes: VisionSizes, pixels: int) -> Picture:
    """Undoes `omni.processing.frames.patchify` on the first of a grid's frames, and shrinks it."""
    from PIL import Image

    patches = inputs.pixel_values if tile.kind == IMAGE else inputs.pixel_values_videos
    assert patches is not None
    merge, patch = sizes.merge_size, sizes.patch_size
    per_token = merge**2
    some = patches[tile.first * per_token :][: tile.rows * tile.columns * per_token].float().cpu()
    frame = rearrange(
        some,
        "(gh gw mh mw) (c step ph pw) -> step c (gh mh ph) (gw mw pw)",
        gh=tile.rows,
        gw=tile.columns,
        mh=merge,
        mw=merge,
        c=3,
        ph=patch,
        pw=patch,
    )[0]
    mean, std = (torch.tensor(values) for values in sizes.colours(of_clip=tile.kind != IMAGE))
    frame = (frame * std[:, None, None] + mean[:, None, None]).nan_to_num().clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    shrink = min(1.0, math.sqrt(pixels / (picture.width * picture.height)))
    size = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
    return picture.resize(size, Image.Resampling.BOX if shrink < 1 else Image.Resampling.NEAREST)


def _mel_strip(tile: Tile, inputs: Inputs, config: OmniConfig, loudest: float) -> Picture:
    """Every token is equally wide, also where a chunk's last one stands for fewer frames."""
    from PIL import Image

    assert inputs.input_features is not None
    lengths = inputs.mel_lengths.tolist()
    length = lengths[tile.number]
    start = sum(config.audio.token_count(n) for n in lengths[: tile.number])
    spans = torch.tensor(audio_spans(tile.first - start, tile.columns, length, config))
    fine = 8  # columns to a token, of which STRIP_WIDTH are made
    columns = spans[:, :1] + torch.arange(fine) * (spans[:, 1:] - spans[:, :1]) // fine
    mel = inputs.input_features[tile.number, :, columns.flatten()].float().cpu()
    grey = (mel - (loudest - 2)) / 2  # 80 dB below the loudest is black: see `log_mel`
    pixels = grey.nan_to_num().clamp(0, 1).mul(255).byte().flip(0)
    picture = Image.fromarray(pixels.contiguous().numpy(), "L")
    return picture.resize((tile.columns * STRIP_WIDTH, STRIP_HEIGHT), Image.Resampling.BOX)


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
    fewer = f" of {_short(view.full_macs)}, {view.full_macs / view.macs:.1f} times fewer"
    title = f"{_short(view.macs)} multiply-accumulates{fewer if len(view.stages) > 1 else ''}"
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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        with suppress(OSError, ValueError):
            part.unlink()


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, evenly chosen."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]


def _jpeg(picture: Picture) -> bytes:
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return written.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _blend(share: float) -> str:
    """Along STOPS: 0 the first, 1 the last."""
    at = share * (len(STOPS) - 1)
    low = min(int(at), len(STOPS) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in STOPS[low : low + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*ends, strict=True))


def _short(count: int) -> str:
    """Three digits with k, M, G, T, P: 111.0 · 10¹² is 111 T."""
    size = min(5, max(0, (len(str(count)) - 1) // 3))
    value = count / 1000**size
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {['', 'k', 'M', 'G', 'T', 'P'][size]}".rstrip()


def _share(count: int, whole: int) -> str:
    return f"{100 * count / whole:.1f} %" if whole else ""


def _with_share(count: int, whole: int) -> str:
    return f"{count:,} ({100 * count / whole:.0f} %)"


def _span(layers: tuple[int, int]) -> str:
    first, end = layers[0] + 1, layers[1]
    return "" if end < first else str(first) if first == end else f"{first}-{end}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
