"""What each stage kept, as data and as words: a token's way, a table in plain text, tiles to draw.

`omni.show` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from omni.config import OmniConfig
from omni.engine import Prefill
from omni.inputs import InputError, Inputs
from omni.processing.frames import Pixels, VisionSizes
from omni.processing.positions import layout

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")

KINDS = ("text", "image", "video", "audio")
"""Kinds of token; a token's kind is an index into these."""
TEXT, IMAGE, VIDEO, AUDIO = range(len(KINDS))

TILE_PIXELS, ALL_PIXELS = 256**2, 64 * 256**2
"""Pixels of a thumbnail, and of all together, at most. Of pure noise, the worst there is, they take 2 MB in a page."""
STRIP_TOKENS, STRIP_WIDTH, STRIP_HEIGHT = 150, 3, 40
"""Audio tokens in a stretch of sound at most; pixels to a token, and of the height."""
TABLE_WINDOWS = 40
"""Windows in the plain table at most."""

GONE, STOPS = "#64748b", ("#8b5cf6", "#0ea5e9", "#22c55e", "#facc15")
"""Colours of tokens that did not enter the decoder, and of those that did, from the first drop to the last."""


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


def explain(inputs: Inputs, prefill: Prefill) -> str:
    """What each stage of a prefill kept, as a table in plain text to print: tokens and multiply-accumulates by stage,
    then tokens by window. inputs: what was prefilled. Errors: `read`."""
    view = read(inputs, prefill)
    shown = [kind for kind in KINDS if view.stages[0].tokens[kind]]
    rows = [["stage", "layers", "tokens", "left", *shown, "multiply-acc.", "every token"]]
    for stage in view.stages:
        tokens = [_with_share(stage.tokens[kind], view.stages[0].tokens[kind]) for kind in shown]
        costs = [short(stage.macs), short(stage.full_macs)] if stage.macs else ["", ""]
        share = _share(stage.total, view.stages[0].total)
        rows.append([stage.name, _span(stage.layers), f"{stage.total:,}", share, *tokens, *costs])
    rows.append(["all, with the head", *[""] * (3 + len(shown)), short(view.macs), short(view.full_macs)])
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
    """Which token came how far, and what that cost. Raises InputError for a prefill of other inputs."""
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
            seconds = 0.0
            if kind == VIDEO and inputs.video_second_per_grid is not None:
                seconds = float(inputs.video_second_per_grid[number])
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
    """The first of a grid's frames, small: of the request's bytes or, where it holds patches, of what
    `omni.processing.frames.patchify` made them from."""
    from PIL import Image

    # Not by the field, which would turn bytes into patches for good.
    held = inputs.held("pixel_values" if tile.kind == IMAGE else "pixel_values_videos")
    frame = _of_bytes(tile, held) if isinstance(held, Pixels) else _of_patches(tile, held, sizes)
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    shrink = min(1.0, math.sqrt(pixels / (picture.width * picture.height)))
    size = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
    return picture.resize(size, Image.Resampling.BOX if shrink < 1 else Image.Resampling.NEAREST)


def _of_bytes(tile: Tile, held: Pixels) -> Tensor:
    """(3, h, w) uint8."""
    before = int(held.grid_thw[: tile.number].prod(dim=1).sum()) // held.sizes.merge_size**2
    grid = (tile.first - before) // (tile.rows * tile.columns)
    return held.frames[tile.number][grid * held.sizes.temporal_patch_size].cpu()


def _of_patches(tile: Tile, patches: Tensor, sizes: VisionSizes) -> Tensor:
    """(3, h, w) uint8."""
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
    return (frame * std[:, None, None] + mean[:, None, None]).nan_to_num().clamp(0, 1).mul(255).round().byte()


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


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, evenly chosen."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]


def _blend(share: float) -> str:
    """Along STOPS: 0 the first, 1 the last."""
    at = share * (len(STOPS) - 1)
    low = min(int(at), len(STOPS) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in STOPS[low : low + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*ends, strict=True))


def short(count: int) -> str:
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
