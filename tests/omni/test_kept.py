"""What each stage kept, as data and as words: windows, tiles, pictures and sound in small, the table."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from test_stages import LAYERS, REQUESTS

import seats.selection
from omni.kept import VIDEO, audio_spans, draw_tiles, explain, lay_tiles, read
from omni.processing.frames import QWEN3_OMNI_SIZES, Pixels, VisionSizes, patchify
from omni.processing.positions import layout
from seats.config import SeatsConfig
from tests.omni.pairs import FAMILIES, Pair, make_request

SETTINGS = SeatsConfig(  # every step drops some
    video_ratio=0.2,
    audio_ratio=0.25,
    encoder_ratio_scale=2.2,
    drop_layers=(2, 3),
    late_layer=5,
    window_temperature=0.1,
)
MIXED = [*REQUESTS["several media"], ("image", 4, 8), ("text", 2)]
MEDIA: dict[str, list[tuple]] = {**REQUESTS, "pictures alone": [("text", 3), ("image", 6, 10), ("text", 2)]}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": LAYERS, "max_position_embeddings": 16384})


def test_frames_are_those_that_went_in(pair: Pair) -> None:
    """Patches become the picture again that they were made from, as small as it is drawn."""
    from PIL import Image

    sizes = QWEN3_OMNI_SIZES if pair.model.config.family == "qwen3_omni_moe" else VisionSizes()
    side = sizes.factor
    inputs = make_request(pair, [("text", 2), ("video", 2, 4, 6, 1.0), ("text", 2)])
    frames = torch.randint(0, 256, (4, 3, 2, 3)).repeat_interleave(side, 2).repeat_interleave(side, 3).byte()
    inputs.pixel_values_videos, grid = patchify(frames, sizes)
    assert grid.tolist() == inputs.video_grid_thw[0].tolist()
    view = read(inputs, pair.model.prefill(inputs))
    tiles, _ = lay_tiles(view, inputs, pair.model.config, most=9)
    drawn = draw_tiles(tiles, inputs, pair.model.config, sizes)
    inputs.pixel_values_videos = Pixels((frames,), sizes, of_clip=True)
    of_bytes = draw_tiles(tiles, inputs, pair.model.config, sizes)
    assert isinstance(
        inputs.held("pixel_values_videos"), Pixels
    )  # they would take four times the memory, and be others
    for picture, other, frame in zip(drawn, of_bytes, frames[::2], strict=True):
        expected = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        assert picture.size == other.size == expected.size
        assert picture.tobytes() == other.tobytes() == expected.tobytes()


def test_bytes_of_several_pictures_and_clips(pair: Pair) -> None:
    """Each tile has its own frame, and there may be more pictures than clips."""
    sizes = QWEN3_OMNI_SIZES if pair.model.config.family == "qwen3_omni_moe" else VisionSizes()
    patch = sizes.patch_size
    parts = [
        ("text", 2),
        ("image", 4, 4),
        ("video", 3, 4, 6, 1.0),
        ("image", 2, 4),
        ("video", 2, 2, 2, 0.5),
        ("image", 4, 2),
    ]
    inputs = make_request(pair, [*parts, ("text", 2)])
    torch.manual_seed(0)
    made = {"image": [], "video": []}
    for kind, *grid in parts[1:]:
        count, (height, width) = (1, grid) if kind == "image" else (2 * grid[0], grid[1:3])
        made[kind].append(torch.randint(0, 256, (count, 3, height * patch, width * patch)).byte())
    inputs.pixel_values = Pixels(tuple(made["image"]), sizes)
    inputs.pixel_values_videos = Pixels(tuple(made["video"]), sizes, of_clip=True)
    view = read(inputs, pair.model.prefill(inputs))
    tiles, _ = lay_tiles(view, inputs, pair.model.config, most=9)
    seen = [*(picture[0] for picture in made["image"]), *(frame for clip in made["video"] for frame in clip[::2])]
    for picture, frame in zip(draw_tiles(tiles, inputs, pair.model.config, sizes), seen, strict=True):
        assert picture.size == (frame.shape[2], frame.shape[1])
        assert picture.tobytes() == frame.permute(1, 2, 0).contiguous().numpy().tobytes()
    spans = [tile.seconds for tile in tiles if tile.kind == VIDEO]
    assert spans == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (0.0, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize("frames", [1, 4, 7, 99, 100, 101, 200, 437, 1333])
def test_tokens_of_sound_cover_it(pair: Pair, frames: int) -> None:
    """In order, each with some, none left out but for what no token is made of."""
    config = pair.model.config
    spans = audio_spans(0, config.audio.token_count(frames), frames, config)
    assert all(begin < end for begin, end in spans)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    if spans:
        assert spans[0][0] == 0
        assert frames - spans[-1][1] < 4


@pytest.mark.parametrize("name", MEDIA)
def test_the_table(pair: Pair, name: str) -> None:
    """A line for each stage with its tokens, and for each window with what it has left."""
    inputs = make_request(pair, MEDIA[name])
    prefill = pair.model.prefill(inputs, seats=SETTINGS)
    text = explain(inputs, prefill)
    lines = text.splitlines()
    assert len({len(line) for line in lines[:2]}) <= 2 and max(map(len, lines)) < 160
    if not prefill.kept:
        assert len(lines) == 4 and lines[-1] == "every token kept"
        return
    assert f"{prefill.full_macs / prefill.macs:.2f} times fewer" in text
    names = ["All tokens", "Before the decoder", "After layer 2", "After layer 3", "Late removal, after layer 4"]
    for line, stage, total in zip(lines[1:], names, [inputs.input_ids.shape[1], *prefill.segments], strict=False):
        assert line.startswith(stage) and f" {total:,} " in line
    first = next(number for number, line in enumerate(lines) if line.startswith("window ")) + 1
    counts = [[int(n) for n in re.findall(r"\d+(?= \+ )", line)] for line in lines[first:]]
    there = (inputs.input_ids[0] == pair.model.config.token_ids.video).nonzero().flatten()
    left = [len(there), *(int(torch.isin(there, kept).sum()) for kept in prefill.kept)]
    assert [sum(column) for column in zip(*counts, strict=True)] == left


def test_windows_are_those_that_selection_makes(pair: Pair) -> None:
    """Of a sound, a clip with sound and a silent one, in the order of the prompt: a window's tokens on the page are
    those that `windows_of` puts together, and a medium's windows are its own."""
    parts = [("audio", 333), ("text", 3), ("video", 4, 8, 4, 1.0, 700), ("text", 2), ("video", 2, 6, 6, 1.0)]
    inputs = make_request(pair, [("text", 3), *parts, ("text", 2)])
    prefill = pair.model.prefill(inputs, seats=SETTINGS)
    view = read(inputs, prefill)
    places = layout(inputs, pair.model.config)
    kind = torch.zeros(len(view.kind), dtype=torch.uint8)
    kind[places.video], kind[places.audio] = seats.selection.VIDEO, seats.selection.AUDIO
    window, count, _ = seats.selection.windows_of(kind[None], places.clip[None], 100)
    assert len(view.windows) == int(count)
    for of_kind, medium in ((0, places.video), (1, places.audio)):
        shown = [number for number, pair_of in enumerate(view.windows) for _ in pair_of[of_kind]]
        assert window[0, medium].tolist() == shown
    assert view.windows[0] == (range(0), range(config_tokens(pair, 333)))  # the sound alone, first
    assert len(view.windows[-1][1]) == 0  # the silent clip
    paired = view.windows[1:-1]
    assert sum(len(audio) for _, audio in paired) == config_tokens(pair, 700)
    _, first, *_ = (line for line in explain(inputs, prefill).splitlines() if " + " in line)
    assert first.split()[1:4] == ["0", "+", str(len(view.windows[0][1]))]


def config_tokens(pair: Pair, frames: int) -> int:
    return pair.model.config.audio.token_count(frames)
