"""Messages → the tensors of one request."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.inputs import InputError, Inputs
from omni.processing.chat_template import QWEN2_5_OMNI_TEMPLATE, QWEN3_OMNI_TEMPLATE, apply_chat_template, load_template
from omni.processing.frames import Pixels, VisionSizes, vision_sizes
from omni.processing.media import fetched
from omni.processing.media.addresses import data_of, scheme_of
from omni.processing.media.files import named
from omni.processing.parts import Part, checked, read_parts
from omni.processing.prompt import clip_block, expand
from omni.processing.reader import OnFrame, OnPixels, Reader, bounded
from omni.processing.settings import check_sound_settings
from omni.processing.tokenizer import Tokenizer, TokenizerError
from omni.protocol import OURS, Reading
from omni.reuse import REUSE_BYTES

TURN_END = "<|im_end|>"


class Processor:
    """The parts of a checkpoint that turn text and media into tensors: vocabulary, template, sizes.

    Raises TokenizerError, ChatTemplateError or ConfigError for files that are missing or damaged.
    """

    def __init__(
        self, folder: Path, config: OmniConfig, tokenizer: Tokenizer | None = None, *, reuse: int = REUSE_BYTES
    ) -> None:
        """tokenizer: of the folder, where it has been read already. reuse: bytes that media last read may take, scaled
        frames and spectrograms; 0 keeps none."""
        self.config = config
        self.tokenizer = tokenizer or Tokenizer.from_folder(folder)
        if self.tokenizer.vocab_size > config.decoder.vocab_size:
            raise TokenizerError(
                f"the tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model up to "
                f"{config.decoder.vocab_size - 1}: its files belong to another model."
            )
        _check_added_tokens(self.tokenizer, config, folder)
        fallback = QWEN3_OMNI_TEMPLATE if config.family == QWEN3 else QWEN2_5_OMNI_TEMPLATE
        self.template = load_template(folder) or fallback
        self.sizes = vision_sizes(folder, config)
        check_sound_settings(folder, config)
        self.reader = Reader(config, reuse)

    def forget(self) -> None:
        """Drops the media that were read."""
        self.reader.kept.clear()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ends of a turn, for checkpoints that name none."""
        return tuple(self.tokenizer.token_to_id(token) for token in (TURN_END, "<|endoftext|>"))

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
        urls: bool = False,
        on_frame: OnFrame | None = None,
        on_pixels: OnPixels | None = None,
        reading: Reading = OURS,
    ) -> Inputs:
        """A conversation with media → the tensors of one request, on the CPU.

        messages: `omni.processing.chat_template.apply_chat_template` describes them, `omni.processing.parts` their
        media and these' own settings, which go before the options here, `omni.processing.media.files` what a medium may
        be.
        use_audio_in_video: whether clips are heard; one without sound is seen alone. fps, max_frames: of clips.
        min_pixels, max_pixels: per frame and picture; unless given the checkpoint's (`vision_sizes`). total_pixels: of
        all that the model sees of a clip, two frames to a grid, which lowers max_pixels of long ones. urls: whether
        http:// and https:// addresses are fetched, into temporary files (`omni.processing.media.addresses`). on_frame:
        called with (frames done, frames in all) of each clip while it is decoded. on_pixels: likewise, with the clip's
        `Pixels` and how many of their frames are there; with others where a file turns out to need reading anew. Sound
        is read beside the pictures. reading: how the measurements of a paper read clips, where they are to be repeated.
        What was read before, and has not changed since, is not read again (`omni.processing.reader`): requests may
        share their tensors, which are not to be written to.
        Raises InputError, MediaError, ChatTemplateError or TokenizerError.
        """
        options = checked("video", {"fps": fps, "max_frames": max_frames, "use_audio_in_video": use_audio_in_video})
        options["reading"] = reading
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
        pixels |= checked("video", {name: value for name, value in pixels.items() if value is not None})
        plain, parts = read_parts(messages)
        ids = apply_chat_template(self.tokenizer, self.template, plain)  # before minutes go into decoding
        sizes = bounded(self.sizes, **pixels)
        with ExitStack() as stack:
            local = [replace(part, source=_local(part.source, urls, stack)) for part in parts]
            return self._prepared(ids, local, sizes, options, on_frame, on_pixels)

    def _prepared(
        self,
        ids: list[int],
        parts: list[Part],
        bounds: VisionSizes,
        options: dict[str, Any],
        on_frame: OnFrame | None,
        on_pixels: OnPixels | None,
    ) -> Inputs:
        tokens = self.config.token_ids
        blocks: list[tuple[int, list[int]]] = []
        images: list[Tensor] = []
        clips: list[Tensor] = []
        seconds: list[float] = []
        sounds: list[Tensor] = []
        listen = options["use_audio_in_video"]
        with_sound = {part.settings.get("use_audio_in_video", listen) for part in parts if part.kind == "video"}
        seen, mels = self.reader.read(parts, bounds, options, on_frame, on_pixels)
        for part, found, mel in zip(parts, seen, mels, strict=True):
            if part.kind == "image":
                images.append(found)
                count = found.shape[2] * found.shape[3] // bounds.factor**2
                blocks.append((tokens.image, [tokens.image] * count))
            elif part.kind == "audio":
                if mel is None:
                    raise InputError(f"{_name(part.source)} has no sound: give it as a video or leave it out.")
                count = self.config.audio.token_count(mel.shape[1])
                if count == 0:
                    frames = mel.shape[1]
                    raise InputError(f"{_name(part.source)} is too short for a single audio token: {frames} frames.")
                sounds.append(mel)
                blocks.append((tokens.audio, [tokens.audio] * count))
            else:
                clips.append(found.frames)
                seconds.append(bounds.temporal_patch_size / found.fps)
                heard = None
                # A sound too short for a single token is none.
                if mel is not None and (count := self.config.audio.token_count(mel.shape[1])):
                    sounds.append(mel)
                    heard = count
                grid = Pixels((found.frames,), bounds).grid_thw[0].tolist()
                blocks.append((tokens.video, clip_block(grid, seconds[-1], heard, self.config)))
        fields: dict[str, Any] = {}
        if images:
            fields["pixel_values"] = Pixels(tuple(images), bounds)
            fields["image_grid_thw"] = fields["pixel_values"].grid_thw
        if clips:
            fields["pixel_values_videos"] = Pixels(tuple(clips), bounds, of_clip=True)
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
        use_audio_in_video = any(with_sound) if with_sound else listen
        return Inputs(torch.tensor([expand(ids, blocks)]), use_audio_in_video=use_audio_in_video, **fields)


def _check_added_tokens(tokenizer: Tokenizer, config: OmniConfig, folder: Path) -> None:
    """Raises TokenizerError where a token that a prompt needs would come out as its letters, which no error would show:
    its list is absent, or another model's."""
    known, tokens = set(tokenizer.added_tokens.values()), config.token_ids
    lacking = [text for text in ("<|im_start|>", TURN_END) if text not in tokenizer.added_tokens]
    media = {"image": tokens.image, "video": tokens.video, "audio": tokens.audio}
    lacking += [f"{id} ({kind})" for kind, id in media.items() if id not in known]
    if lacking:
        raise TokenizerError(
            f"{folder}: the tokenizer lists no added token {', '.join(lacking)}. tokenizer_config.json, tokenizer.json "
            "or added_tokens.json of this model, which lists them, is missing."
        )


def _local(source: Any, urls: bool, stack: ExitStack) -> Any:
    """A source, or a list of frames, with what is on the network fetched until the stack ends.

    data: addresses are unpacked: a medium is opened several times.
    """
    if isinstance(source, list):
        return [_local(each, urls, stack) for each in source]
    if scheme_of(source) == "data":
        return data_of(source)
    return stack.enter_context(fetched(source, urls=urls))


def _name(source: Any) -> str:
    """A source in a message: its path, or what kind of object it is."""
    return named(source) if isinstance(source, (str, os.PathLike, bytes)) else f"a {type(source).__name__}"
