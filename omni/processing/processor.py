"""Messages → the tensors of one request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.inputs import InputError, Inputs
from omni.processing.beside import Beside
from omni.processing.chat import QWEN2_5_OMNI_TEMPLATE, QWEN3_OMNI_TEMPLATE, encode_chat, load_template
from omni.processing.frames import Pixels, VisionSizes, resize, target_size, vision_sizes
from omni.processing.media import Video, fetched, read_audio, read_image, read_video
from omni.processing.media.addresses import data_of, scheme_of
from omni.processing.media.files import is_array, is_file_object, named
from omni.processing.media.sound import PastEndError
from omni.processing.mel import log_mel
from omni.processing.parts import Part, read_parts
from omni.processing.prompt import clip_block, expand
from omni.processing.settings import check_sound_settings
from omni.processing.tokenizer import Tokenizer, TokenizerError

TURN_END = "<|im_end|>"


class Processor:
    """The parts of a checkpoint that turn text and media into tensors: vocabulary, template, sizes.

    Raises TokenizerError, ChatTemplateError or ConfigError for files that are missing or damaged.
    """

    def __init__(self, folder: Path, config: OmniConfig, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: of the folder, where it has been read already."""
        self.config = config
        self.tokenizer = tokenizer or Tokenizer.from_folder(folder)
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
        urls: bool = False,
        on_frame: Callable[[int, int], None] | None = None,
    ) -> Inputs:
        """A conversation with media → the tensors of one request, on the CPU.

        messages: `omni.processing.chat.encode_chat` describes them, `omni.processing.parts` their media and these'
        own settings, which go before the options here, `omni.processing.media.files` what a medium may be.
        use_audio_in_video: whether clips are heard; one without sound is seen alone. fps, max_frames: of clips.
        min_pixels, max_pixels: per frame and picture; unless given the checkpoint's (`vision_sizes`). total_pixels: of
        all that the model sees of a clip, two frames to a grid, which lowers max_pixels of long ones. urls: whether
        http:// and https:// addresses are fetched, into temporary files (`omni.processing.media.addresses`). on_frame:
        called with (frames done, frames in all) of each clip while it is decoded. Sound is read beside the pictures.
        Raises InputError, MediaError, ChatTemplateError or TokenizerError.
        """
        plain, parts = read_parts(messages)
        ids = encode_chat(self.tokenizer, self.template, plain)  # before minutes go into decoding
        options = {"fps": fps, "max_frames": max_frames, "use_audio_in_video": use_audio_in_video}
        sizes = _bounded(self.sizes, min_pixels, max_pixels, total_pixels)
        with ExitStack() as stack:
            local = [replace(part, source=_local(part.source, urls, stack)) for part in parts]
            return self._prepared(ids, local, sizes, options, on_frame)

    def _prepared(
        self,
        ids: list[int],
        parts: list[Part],
        bounds: VisionSizes,
        options: dict[str, Any],
        on_frame: Callable[[int, int], None] | None,
    ) -> Inputs:
        tokens = self.config.tokens
        blocks: list[tuple[int, list[int]]] = []
        images: list[Tensor] = []
        clips: list[Tensor] = []
        seconds: list[float] = []
        sounds: list[Tensor] = []
        listen = options["use_audio_in_video"]
        with_sound = {part.settings.get("use_audio_in_video", listen) for part in parts if part.kind == "video"}
        with Beside(lambda stopped: self._log_mels([_hear(part, listen, stopped) for part in parts])) as hearing:
            if any(is_file_object(part.source) for part in parts):  # it stands at one place at a time
                hearing.wait()
            seen = [_see(part, bounds, options, on_frame) for part in parts]
            mels = hearing.wait()
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


def _local(source: Any, urls: bool, stack: ExitStack) -> Any:
    """A source, or a list of frames, with what is on the network fetched until the stack ends.

    data: addresses are unpacked: a medium is opened several times.
    """
    if isinstance(source, list):
        return [_local(each, urls, stack) for each in source]
    if scheme_of(source) == "data":
        return data_of(source)
    return stack.enter_context(fetched(source, urls=urls))


def _hear(part: Part, use_audio_in_video: bool, stopped: Callable[[], bool]) -> Tensor | None:
    """The waveform of a medium, None where it has none or is not to be heard."""
    given = part.settings
    track = given.get("audio_track")
    if part.kind == "audio":
        start, end = given.get("audio_start", 0.0), given.get("audio_end")
        return read_audio(part.source, start=start, end=end, track=track, stopped=stopped)
    if part.kind != "video" or not given.get("use_audio_in_video", use_audio_in_video):
        return None
    if _is_frames(part.source):  # they have no sound beside them
        if track is not None:
            raise InputError(f"{part.where}: audio_track is for files; frames have no sound.")
        return None
    start, end = given.get("video_start", 0.0), given.get("video_end")
    try:
        return read_audio(part.source, start=start, end=end, track=track, stopped=stopped)
    except PastEndError:  # of the sound; whether it is the clip's, its frames show
        return None


def _see(part: Part, bounds: VisionSizes, options: dict[str, Any], on_frame: Callable[[int, int], None] | None) -> Any:
    """(1, 3, h, w) uint8 of a picture, the Video of a clip, None of a sound."""
    if part.kind == "audio":
        return None
    sizes = _part_sizes(bounds, part)
    if part.kind == "video":
        return _watch(part, sizes, options, on_frame)
    picture = read_image(part.source)
    size = _stated_size(part, sizes) or sizes.image_size(picture.shape[1], picture.shape[2])
    return resize(picture[None], size).clone()  # whoever gave an array may write to it


def _watch(
    part: Part, sizes: VisionSizes, options: dict[str, Any], on_frame: Callable[[int, int], None] | None
) -> Video:
    """The frames of a clip, by its own settings, then those of the call."""
    given, source, fps = part.settings, part.source, part.settings.get("fps", options["fps"])
    listed = isinstance(source, list) or is_array(source)
    if "sample_fps" in given and not listed:
        raise InputError(f"{part.where}: sample_fps is the rate of a list of frames; of a clip give fps.")
    if listed:  # its fps is the rate at which the frames follow: all of them are seen
        fps = given.get("sample_fps", given.get("fps"))
        if fps is None:
            what = "a list of frames" if isinstance(source, list) else "an array of frames"
            raise InputError(f"{part.where}: {what} needs fps, how many of them make a second.")
        source = (list(source) if len(getattr(source, "shape", "1234")) == 4 else source, fps)
    least = 2 * -(-given["min_frames"] // 2) if "min_frames" in given else 2 if listed else sizes.min_frames
    most = 2 * (given["max_frames"] // 2) if "max_frames" in given else options["max_frames"]
    if "min_frames" in given and "max_frames" not in given:
        most = max(least, most)
    if "max_frames" in given and "min_frames" not in given:
        least = min(least, most)
    size = _stated_size(part, sizes)
    return read_video(
        source,
        fps=fps,
        max_frames=most,
        min_frames=least,
        nframes=given.get("nframes"),
        start=given.get("video_start", 0.0),
        end=given.get("video_end"),
        size_for=sizes.clip_size if size is None else lambda *_: size,
        on_frame=on_frame,
    )


def _is_frames(source: Any) -> bool:
    return isinstance(source, (list, tuple)) or is_array(source)


def _part_sizes(sizes: VisionSizes, part: Part) -> VisionSizes:
    least, most, total = (part.settings.get(key) for key in ("min_pixels", "max_pixels", "total_pixels"))
    if part.kind == "image" and total is not None:  # of all that is seen of it: it is one
        most, total = min(total, most or sizes.image_max_pixels), None
    try:
        return _bounded(sizes, least, most, total)
    except InputError as error:
        raise InputError(f"{part.where}: {error}") from None


def _stated_size(part: Part, sizes: VisionSizes) -> tuple[int, int] | None:
    """The size that resized_height and resized_width ask for, in whole tokens and within the part's bounds, or, as
    qwen-omni-utils has it, those of pictures."""
    given = part.settings
    if "resized_height" not in given:
        return None
    return target_size(
        given["resized_height"],
        given["resized_width"],
        factor=sizes.factor,
        min_pixels=given.get("min_pixels", min(4 * sizes.factor**2, sizes.image_max_pixels)),
        max_pixels=given.get("max_pixels", max(sizes.image_max_pixels, sizes.image_min_pixels)),
    )


def _bounded(
    sizes: VisionSizes, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None
) -> VisionSizes:
    """`sizes` with new bounds, where given, for pictures and clips alike. One that is given moves the other along."""
    least = sizes.factor**2
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels), ("total_pixels", total_pixels)):
        if value is not None and value < (1 if name == "total_pixels" else least):
            limit = "1" if name == "total_pixels" else f"{least}, the pixels of one token"
            raise InputError(f"{name} must be at least {limit}, not {value}.")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise InputError("min_pixels must not exceed max_pixels.")

    def bounds(low: int, high: int) -> tuple[int, int]:
        if max_pixels is not None:
            low, high = min(low, max_pixels), max_pixels
        if min_pixels is not None:
            low, high = min_pixels, max(high, min_pixels)
        return low, high

    image = bounds(sizes.image_min_pixels, sizes.image_max_pixels)
    video = bounds(sizes.video_min_pixels, sizes.video_max_pixels)
    return replace(
        sizes,
        image_min_pixels=image[0],
        image_max_pixels=image[1],
        video_min_pixels=video[0],
        video_max_pixels=video[1],
        video_total_pixels=total_pixels or sizes.video_total_pixels,
    )


def _name(source: Any) -> str:
    """A source in a message: its path, or what kind of object it is."""
    return named(source) if isinstance(source, (str, os.PathLike, bytes)) else f"a {type(source).__name__}"
