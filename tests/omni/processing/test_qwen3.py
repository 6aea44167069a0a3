"""What is Qwen3-Omni's own on the way from messages to tensors: positions and ids of clips, the chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import tone, write_clip
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen3OmniMoeProcessor
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoePreTrainedModelForConditionalGeneration as Public,
)

from omni.config import QWEN3, AudioConfig, DecoderConfig, OmniConfig, TokenIds, VisionConfig
from omni.inputs import InputError, Inputs
from omni.processing import chat_template, sandbox
from omni.processing.chat_template import QWEN3_OMNI_TEMPLATE
from omni.processing.positions import layout
from omni.processing.processor import Processor
from omni.processing.prompt import clip_block

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|audio_start|>"),
    *("<|audio_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<think>", "</think>"),
)
IDS = {mark: 256 + index for index, mark in enumerate(MARKS)}
TEXT = 65
TOKENS = TokenIds(
    image=IDS["<|image_pad|>"],
    video=IDS["<|video_pad|>"],
    audio=IDS["<|audio_pad|>"],
    vision_start=IDS["<|vision_start|>"],
    audio_start=IDS["<|audio_start|>"],
    audio_end=IDS["<|audio_end|>"],
)


def make_config(**vision: int) -> OmniConfig:
    """Sizes that matter to processing are the released ones; `vision` replaces some of the encoder's."""
    sizes = {"in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, **vision}
    return OmniConfig(
        family=QWEN3,
        vision=VisionConfig(
            depth=1,
            hidden_size=8,
            intermediate_size=8,
            num_heads=1,
            spatial_merge_size=2,
            out_hidden_size=8,
            **sizes,
        ),
        audio=AudioConfig(
            num_mel_bins=128,
            hidden_size=8,
            num_layers=1,
            num_heads=1,
            intermediate_size=8,
            n_window=50,
            output_size=8,
            n_window_infer=800,
            conv_channels=8,
        ),
        decoder=DecoderConfig(
            vocab_size=512,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            rope_theta=1e6,
            mrope_section=(2, 1, 1),
            rms_norm_eps=1e-6,
            max_position_embeddings=65536,
            tie_word_embeddings=False,
        ),
        token_ids=TOKENS,
        positions_per_second=13,
        seconds_per_chunk=None,
        dtype=torch.float32,
        stop_token_ids=(),
    )


# One number per patch and per frame of sound, so that hours of video are small.
SMALL = make_config(in_channels=1, patch_size=1, temporal_patch_size=1)
SMALL = replace(SMALL, audio=replace(SMALL.audio, num_mel_bins=1))


def make_request(parts: list[tuple]) -> Inputs:
    """parts: ("text", n), ("image", h, w), ("audio", mel frames), ("video", t, h, w, seconds, mel frames or None);
    pictures in patches."""
    ids: list[int] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    seconds: list[float] = []
    sounds: list[int] = []
    for kind, *sizes in parts:
        if kind == "text":
            ids += [TEXT] * sizes[0]
        elif kind == "audio":
            sounds.append(sizes[0])
            count = SMALL.audio.token_count(sizes[0])
            ids += [TOKENS.audio_start, *[TOKENS.audio] * count, TOKENS.audio_end]
        else:
            grid = [1, *sizes] if kind == "image" else sizes[:3]
            grids[kind].append(grid)
            block = [TOKENS.image] * (grid[1] * grid[2] // 4)
            if kind == "video":
                seconds.append(sizes[3])
                heard = sizes[4]
                sounds += [] if heard is None else [heard]
                block = clip_block(grid, sizes[3], None if heard is None else SMALL.audio.token_count(heard), SMALL)
            ids += [TOKENS.vision_start, *block, IDS["<|vision_end|>"]]
    fields: dict[str, Any] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            grid_thw = torch.tensor(grids[kind])
            fields |= {name: torch.zeros(int(grid_thw.prod(dim=1).sum()), 1), f"{kind}_grid_thw": grid_thw}
    if seconds:
        fields["video_second_per_grid"] = torch.tensor(seconds)
    if sounds:
        mask = (torch.arange(max(sounds)) < torch.tensor(sounds)[:, None]).long()
        fields |= {"input_features": torch.zeros(len(sounds), 1, max(sounds)), "feature_attention_mask": mask}
    heard = any(part[0] == "video" and part[5] is not None for part in parts)
    return Inputs(torch.tensor([ids]), use_audio_in_video=heard, **fields)


def public_positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(3, S) positions and () delta of transformers' `get_rope_index`."""
    config = SimpleNamespace(
        image_token_id=TOKENS.image,
        video_token_id=TOKENS.video,
        audio_token_id=TOKENS.audio,
        vision_start_token_id=TOKENS.vision_start,
        audio_start_token_id=TOKENS.audio_start,
        position_id_per_seconds=13,
        audio_config=SimpleNamespace(n_window=50),
    )
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = MethodType(Public.get_llm_pos_ids_for_vision, model)
    positions, deltas = Public.get_rope_index(
        model,
        inputs.input_ids,
        inputs.image_grid_thw,
        inputs.video_grid_thw,
        torch.ones_like(inputs.input_ids),
        inputs.use_audio_in_video,
        inputs.mel_lengths,
        inputs.video_second_per_grid,
    )
    return positions[:, 0], deltas[0, 0]


SIDES = st.integers(1, 4).map(lambda side: 2 * side)
# Frames on audio tokens (13ths), between them, and at no round number.
SECONDS = st.integers(1, 40).map(lambda n: n / 13) | st.floats(0.04, 12) | st.sampled_from([1.0, 2 / 2.6, 9.375])


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple]:
    """Several media, adjacent or apart. Clips are all heard or all silent: transformers takes no mixture."""
    heard = draw(st.booleans())
    part = st.one_of(
        st.tuples(st.just("text"), st.integers(1, 40)),
        st.tuples(st.just("image"), SIDES, SIDES),
        st.tuples(st.just("audio"), st.integers(1, 700)),
        st.tuples(
            st.just("video"), st.integers(1, 9), SIDES, SIDES, SECONDS, st.integers(1, 1500) if heard else st.none()
        ),
    )
    return draw(st.lists(part, min_size=1, max_size=7))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(parts=prompts())
# Where the order of float32 sums shows: text that ends on a power of two, a prompt of more tokens than positions.
@example(parts=[("text", 8), ("video", 2, 2, 2, 2.6486, 40), ("text", 465), ("video", 6, 2, 2, 1.9654, 44)])
@example(parts=[("text", 7), ("video", 4, 2, 2, 0.5526, 18), ("text", 219), ("video", 1, 2, 2, 1.0085, 40)])
@example(parts=[("text", 5), ("video", 9, 8, 8, 0.11, None)])
def test_positions_equal_transformers(parts: list[tuple]) -> None:
    """To the last bit of float32, whatever the media, their order, their rates and the length of their sounds."""
    inputs = make_request(parts)
    places = layout(inputs, SMALL)
    positions, delta = public_positions(inputs)
    assert places.positions.dtype == torch.float32
    assert torch.equal(places.positions, positions)
    assert places.next_position == inputs.input_ids.shape[1] + float(delta)
    for name, token in (("image", TOKENS.image), ("video", TOKENS.video), ("audio", TOKENS.audio)):
        assert torch.equal(getattr(places, name), (inputs.input_ids[0] == token).nonzero().flatten())


def test_positions_are_sorted_whatever_the_ids_say() -> None:
    """At 6.5 frames a second a frame falls on a sound's instant, which float64 and float32 order differently:
    transformers sorts ids in the one, positions in the other, and so does this."""
    inputs = make_request([("text", 3), ("video", 12, 4, 4, 2 / 6.5, 400), ("text", 2)])
    places = layout(inputs, SMALL)
    block = places.positions[0, places.video.min() : places.audio.max() + 1]
    assert bool((block.diff() >= 0).all())
    instants = 5 + torch.arange(12) * torch.tensor(2 / 6.5) * 13
    assert not torch.equal(places.positions[0, places.video[::4]], instants), "no such rate"
    assert torch.equal(places.positions, public_positions(inputs)[0])


def test_positions_of_heard_and_silent_clips_together() -> None:
    """A prompt that transformers does not take: every clip is laid out as if it were alone."""
    heard, silent = ("video", 4, 4, 4, 0.7, 300), ("video", 3, 4, 2, 0.7, None)
    parts = [("text", 3), heard, ("text", 2), silent, ("text", 4)]
    both = layout(make_request(parts), SMALL).positions
    first = layout(make_request(parts[:3]), SMALL).positions
    assert torch.equal(both[:, : first.shape[1]], first)
    rest = layout(make_request(parts[3:]), SMALL).positions
    torch.testing.assert_close(both[:, first.shape[1] :], rest + first[0, -1] + 1, atol=1e-4, rtol=0)


def test_an_hour_of_video_with_sound() -> None:
    """565,200 tokens are merged without a loop over them: every frame and sound is where the clock says."""
    grids, per_grid, sound = 3600, 144, 46_800
    inputs = make_request([("text", 10), ("video", grids, 24, 24, 1.0, 360_000), ("text", 3)])
    places = layout(inputs, SMALL)
    assert places.counts == {"text": 10 + 4 + 3, "image": 0, "video": grids * per_grid, "audio": sound}
    begin = 12  # after ten words and two marks
    frames = places.positions[:, places.video].view(3, grids, per_grid)
    assert torch.equal(frames[0], (begin + 13.0 * torch.arange(grids))[:, None].expand(-1, per_grid))
    cells = torch.arange(per_grid)
    assert torch.equal(frames[1:], (begin + torch.stack([cells // 12, cells % 12])[:, None]).expand(-1, grids, -1))
    assert torch.equal(places.positions[:, places.audio], (begin + torch.arange(sound)).expand(3, -1).float())
    # Each second opens with its frames, then come its 13 tokens of sound.
    assert torch.equal(places.video[::per_grid], begin + (per_grid + 13) * torch.arange(grids))
    after = begin + sound
    assert places.positions[0, -5:].tolist() == [after, after + 1, after + 2, after + 3, after + 4]
    assert places.next_position == after + 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4)),
    seconds=SECONDS,
    audio_tokens=st.integers(1, 500),
)
def test_clip_ids_equal_transformers(grid: tuple[int, int, int], seconds: float, audio_tokens: int) -> None:
    """Frames and sound take turns exactly as in transformers' processor, token by token."""
    public = SimpleNamespace(
        audio_bos_token="<",
        audio_eos_token=">",
        video_token="v",
        audio_token="a",
        video_processor=SimpleNamespace(merge_size=2),
    )
    thw = np.array([[grid[0], 2 * grid[1], 2 * grid[2]]])
    expected = Qwen3OmniMoeProcessor.replace_video_with_audio_token(
        public,
        {"video_grid_thw": thw, "video_second_per_grid": [seconds]},
        0,
        {"num_audio_tokens": [audio_tokens]},
        0,
        position_id_per_seconds=13.0,
    )
    names = {TOKENS.video: "v", TOKENS.audio: "a", TOKENS.audio_start: "<", TOKENS.audio_end: ">"}
    assert "".join(names[id] for id in clip_block(thw[0].tolist(), seconds, audio_tokens, SMALL)) == expected
    assert clip_block(thw[0].tolist(), seconds, None, SMALL) == [TOKENS.video] * (grid[0] * grid[1] * grid[2])


@pytest.mark.parametrize("seconds", [[0.0], [float("nan")], [-1.0], [float("inf")], [1.0, 1.0]])
def test_impossible_clocks_are_refused(seconds: list[float]) -> None:
    """Frames that do not follow each other have no order among sounds."""
    inputs = make_request([("video", 2, 4, 4, 1.0, 100)])
    inputs.video_second_per_grid = torch.tensor(seconds)
    with pytest.raises(InputError, match="video_second_per_grid must be seconds above 0, one per clip"):
        layout(inputs, SMALL)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None)])
def test_blocks_without_all_their_marks_are_laid_out(cut: slice) -> None:
    """A prompt that ends or begins inside a clip's marks: media keep their own positions."""
    inputs = make_request([("image", 4, 4), ("audio", 100)])
    whole = layout(inputs, SMALL)
    inputs.input_ids = inputs.input_ids[:, cut]
    places = layout(inputs, SMALL)
    missing = cut.start
    assert torch.equal(places.positions[:, places.audio], whole.positions[:, whole.audio] - missing)


def test_blocks_of_the_wrong_length_are_refused() -> None:
    """As many placeholders as tokens, but the sound's in the wrong clip."""
    inputs = make_request([("video", 2, 4, 4, 1.0, 100), ("video", 2, 4, 4, 1.0, 300)])
    inputs.feature_attention_mask = inputs.feature_attention_mask.flip(0)
    with pytest.raises(InputError, match="not as long as its media"):
        layout(inputs, SMALL)


IMAGE, AUDIO, VIDEO = ({"type": kind, kind: f"some.{kind}"} for kind in ("image", "audio", "video"))
ALL_MEDIA = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "a "}, AUDIO, VIDEO]}]


def test_family_template_is_the_published_format() -> None:
    """The prompt, spelled out: ChatML, no default system message, media marks, no thought begun."""
    assert chat_template.render(QWEN3_OMNI_TEMPLATE, ALL_MEDIA, True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a <|audio_start|><|audio_pad|><|audio_end|>"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Be brief."}
    assert chat_template.render(QWEN3_OMNI_TEMPLATE, [system], False) == "<|im_start|>system\nBe brief.<|im_end|>\n"


# Asks for everything that the released template asks for: tools, thoughts of earlier turns, keys of parts.
RELEASED_SHAPE = """
{%- macro write(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'audio' or 'audio' in part or 'audio_url' in part -%}<|audio_start|><|audio_pad|><|audio_end|>
{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools %}{{ raise_exception('no tools were given') }}{% endif -%}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = write(message.content) %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{{ message.tool_calls[0].name }}{% endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        ALL_MEDIA,
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *ALL_MEDIA],
        [*ALL_MEDIA, {"role": "assistant", "content": "A bird."}, {"role": "user", "content": "Which?"}],
    ],
)
def test_templates_of_the_released_shape_render(messages: list[dict[str, Any]], prompted: bool) -> None:
    """What such a template looks for and does not find is absent, no error; the prompt is the built-in one's."""
    expected = sandbox.render(QWEN3_OMNI_TEMPLATE, messages, prompted)
    assert sandbox.render(RELEASED_SHAPE, messages, prompted) == expected


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """With a vocabulary of bytes and marks, no template of its own, and the released files' keys for pictures."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pieces = {piece: id for id, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {str(id): {"content": mark, "special": "think" not in mark} for mark, id in IDS.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    bounds = {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(bounds), encoding="utf-8")
    return Processor(folder, make_config())


def test_a_request_with_all_media(processor: Processor, tmp_path: Path) -> None:
    """A picture, a sound and a clip with sound: marks, sizes, ranges, clock and positions of one whole request."""
    sound = tone(440, 6.0, 16_000)
    clip = write_clip(tmp_path / "clip.mp4", 60, Fraction(10), sound=sound[None], rate=16_000)
    content = [
        {"type": "image", "image": torch.full((100, 90, 3), 255, dtype=torch.uint8)},
        {"type": "audio", "audio": sound[:32_000]},
        {"type": "video", "video": str(clip)},
        {"type": "text", "text": "What?"},
    ]
    inputs = processor.prepare([{"role": "user", "content": content}])
    ids = inputs.input_ids[0].tolist()
    assert inputs.image_grid_thw is not None and inputs.image_grid_thw.tolist() == [[1, 6, 6]]
    assert inputs.pixel_values is not None and torch.equal(inputs.pixel_values, torch.ones(36, 3 * 2 * 16**2))
    assert inputs.video_grid_thw is not None and inputs.video_grid_thw.tolist() == [[6, 20, 28]]
    assert inputs.video_second_per_grid is not None and inputs.video_second_per_grid.tolist() == [1.0]
    assert inputs.pixel_values_videos is not None and inputs.pixel_values_videos.shape == (6 * 20 * 28, 1536)
    assert inputs.pixel_values_videos.min() < -0.9 and inputs.pixel_values_videos.max() > 0.9
    lengths = inputs.mel_lengths.tolist()
    assert lengths[0] == 200 and abs(lengths[1] - 600) < 10
    start = ids.index(TOKENS.image) - 1
    heard = processor.config.audio.token_count(lengths[1])
    assert ids[start : -len("What?") - len("assistant") - 4] == [
        *[TOKENS.vision_start, *[TOKENS.image] * 9, IDS["<|vision_end|>"]],
        *[TOKENS.audio_start, *[TOKENS.audio] * 26, TOKENS.audio_end],
        *[TOKENS.vision_start, *clip_block([6, 20, 28], 1.0, heard, processor.config), IDS["<|vision_end|>"]],
    ]
    places = layout(inputs, processor.config)
    assert torch.equal(places.positions, public_positions(inputs)[0])


def test_bounds_are_checked_in_tokens_of_the_family(processor: Processor) -> None:
    """The least a picture may be is one token: 32 x 32 pixels here."""
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(InputError, match="max_pixels must be at least 1024"):
        processor.prepare(messages, max_pixels=1023)
    with pytest.raises(InputError, match="min_pixels must not exceed max_pixels"):
        processor.prepare(messages, min_pixels=4096, max_pixels=2048)
    processor.prepare(messages, min_pixels=1024, max_pixels=1024)
