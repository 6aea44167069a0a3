"""Messages → the tensors of one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.inputs import InputError, Inputs
from omni.processing.chat import QWEN2_5_OMNI_TEMPLATE, QWEN3_OMNI_TEMPLATE, encode_chat, load_template
from omni.processing.frames import Pixels, VisionSizes, resize, vision_sizes
from omni.processing.media import read_audio, read_image, read_video
from omni.processing.mel import log_mel
from omni.processing.prompt import clip_block, expand
from omni.processing.settings import check_sound_settings
from omni.processing.tokenizer import Tokenizer, TokenizerError

TURN_END = "<|im_end|>"


class Processor:
    """The parts of a checkpoint that turn text and media into tensors: vocabulary, template, sizes.

    Raises TokenizerError, ChatTemplateError or ConfigError for files that are missing or damaged.
    """

    def __init__(self, folder: Path, config: OmniConfig) -> None:
        self.config = config
        self.tokenizer = Tokenizer.from_folder(folder)
        if self.tokenizer.vocab_size > config.decoder.vocab_size:
            raise TokenizerError(
                f"the tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model up to "
                f"{config.decoder.vocab_size - 1}: its files belong to another model."
            )
        fallback = QWEN3_OMNI_TEMPLATE if config.family == QWEN3 else QWEN2_5_OMNI_TEMPLATE
        self.template = load_template(folder) or fallback
        self.sizes = vision_sizes(folder, config)
        check_sound_settings(folder, config)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ends of a turn, for checkpoints that name none."""
        return tuple(self.tokenizer.id_of(token) for token in (TURN_END, "<|endoftext|>"))

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        use_audio_in_video: bool = True,
        fps: float = 2.0,
        max_frames: int = 768,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        on_frame: Callable[[int, int], None] | None = None,
    ) -> Inputs:
        """A conversation with media → the tensors of one request, on the CPU.

        messages: `omni.processing.chat.encode_chat` describes them, `omni.processing.media` what a medium may be.
        use_audio_in_video: whether clips are heard; one without sound is seen alone. fps, max_frames: of clips.
        min_pixels, max_pixels: per frame and picture; unless given the checkpoint's (`vision_sizes`). total_pixels: of
        all that the model sees of a clip, two frames to a grid, which lowers max_pixels of long ones. on_frame: called
        with (frames done, frames in all) of each clip while it is decoded.
        Raises InputError, MediaError, ChatTemplateError or TokenizerError.
        """
        ids = encode_chat(self.tokenizer, self.template, messages)  # before minutes go into decoding
        sizes = _bounded(self.sizes, min_pixels, max_pixels)
        if total_pixels is not None and total_pixels < 1:
            raise InputError(f"total_pixels must be at least 1, not {total_pixels}.")
        if total_pixels is not None:
            sizes = replace(sizes, video_total_pixels=total_pixels)
        tokens = self.config.tokens
        blocks: list[tuple[int, list[int]]] = []
        images: list[Tensor] = []
        clips: list[Tensor] = []
        seconds: list[float] = []
        sounds: list[Tensor] = []
        media = _media(messages)
        mels = self._log_mels([_hear(kind, source, use_audio_in_video) for kind, source in media])
        for (kind, source), mel in zip(media, mels, strict=True):
            if kind == "image":
                picture = read_image(source)
                size = sizes.image_size(picture.shape[1], picture.shape[2])
                images.append(resize(picture[None], size).clone())  # whoever gave an array may write to it
                count = size[0] * size[1] // sizes.factor**2
                blocks.append((tokens.image, [tokens.image] * count))
            elif kind == "audio":
                if mel is None:
                    raise InputError(f"{_name(source)} has no sound: give it as a video or leave it out.")
                count = self.config.audio.token_count(mel.shape[1])
                if count == 0:
                    raise InputError(f"{_name(source)} is too short for a single audio token: {mel.shape[1]} frames.")
                sounds.append(mel)
                blocks.append((tokens.audio, [tokens.audio] * count))
            else:
                video = read_video(
                    source,
                    fps=fps,
                    max_frames=max_frames,
                    min_frames=sizes.min_frames,
                    size_for=sizes.clip_size,
                    on_frame=on_frame,
                )
                clips.append(video.frames)
                seconds.append(sizes.temporal_patch_size / video.fps)
                heard = None
                # A sound too short for a single token is none.
                if mel is not None and (count := self.config.audio.token_count(mel.shape[1])):
                    sounds.append(mel)
                    heard = count
                grid = Pixels((video.frames,), sizes).grid_thw[0].tolist()
                blocks.append((tokens.video, clip_block(grid, seconds[-1], heard, self.config)))
        fields: dict[str, Any] = {}
        if images:
            fields["pixel_values"] = Pixels(tuple(images), sizes)
            fields["image_grid_thw"] = fields["pixel_values"].grid_thw
        if clips:
            fields["pixel_values_videos"] = Pixels(tuple(clips), sizes, of_clip=True)
            fields["video_grid_thw"] = fields["pixel_values_videos"].grid_thw
            fields["video_second_per_grid"] = torch.tensor(seconds)
        if sounds:
            lengths = torch.tensor([mel.shape[1] for mel in sounds])
            longest = int(lengths.max())
            # One sound is not copied, either.
            fields["input_features"] = (
                sounds[0][None]
                if len(sounds) == 1
                else torch.stack([F.pad(mel, (0, longest - mel.shape[1])) for mel in sounds])
            )
            fields["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return Inputs(torch.tensor([expand(ids, blocks)]), use_audio_in_video=use_audio_in_video, **fields)

    def _log_mels(self, waveforms: list[Tensor | None]) -> list[Tensor | None]:
        """Spectrograms of a prompt's sounds, padded as the family's processor pads them. Empties `waveforms`."""
        bins, padded_to = self.config.audio.num_mel_bins, None
        if self.config.family == QWEN3:
            padded_to = max((len(waveform) for waveform in waveforms if waveform is not None), default=0)
        mels: list[Tensor | None] = []
        while waveforms:  # of hours of sound one is held as both
            waveform = waveforms.pop(0)
            mels.append(None if waveform is None else log_mel(waveform, bins, padded_to))
        return mels


def _hear(kind: str, source: Any, use_audio_in_video: bool) -> Tensor | None:
    """The waveform of a medium, None where it has none or is not to be heard."""
    # Frames that are an array have no sound beside them.
    if kind == "audio" or (kind == "video" and use_audio_in_video and not isinstance(source, tuple)):
        return read_audio(source)
    return None


def _bounded(sizes: VisionSizes, min_pixels: int | None, max_pixels: int | None) -> VisionSizes:
    """`sizes` with the caller's bounds, where given, for pictures and clips alike."""
    least = sizes.factor**2
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, the pixels of one token, not {value}.")

    def bounds(low: int, high: int) -> tuple[int, int]:
        high = high if max_pixels is None else max_pixels
        # A lower ceiling than the checkpoint's floor lowers the floor.
        low = min(low, high) if min_pixels is None else min_pixels
        if low > high:
            raise InputError("min_pixels must not exceed max_pixels.")
        return low, high

    image = bounds(sizes.image_min_pixels, sizes.image_max_pixels)
    video = bounds(sizes.video_min_pixels, sizes.video_max_pixels)
    return replace(
        sizes,
        image_min_pixels=image[0],
        image_max_pixels=image[1],
        video_min_pixels=video[0],
        video_max_pixels=video[1],
    )


def _media(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """(kind, source) of every media part, in order; the messages have passed `encode_chat`."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def _name(source: Any) -> str:
    """A source in a message: its path, or what kind of object it is."""
    return str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
