"""Containers → sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omni.processing.frames import MediaError
from omni.processing.media.files import (
    as_array,
    described,
    frames_of,
    is_array,
    moving_pictures,
    open_container,
    packets,
    require_decoder,
    seconds_of,
    warn_if_short,
)

# A few bytes can claim any length: silence between the time stamps is believed up to six hours in all, sound up to a
# day, which is a million tokens and more.
MAX_SILENCE = 6 * 3600
MAX_SECONDS = 24 * 3600


def read_audio(source: Any, *, sample_rate: int = 16_000) -> Tensor | None:
    """(n,) float32 mono, the plain mean of the channels; None for a file without sound.

    Sample 0 is the instant of the first frame where the file has pictures: sound that starts later is
    preceded by zeros, what comes before is cut. Gaps in the time stamps are filled with zeros. Sound that is
    cut off gives what can be decoded, with a warning. Raises MediaError where nothing is left.
    """
    import av

    if isinstance(source, tuple) or is_array(source):
        array, rate = source if isinstance(source, tuple) else (source, 16_000)
        return _resample_array(as_array(array), rate, sample_rate)
    with open_container(source) as (container, name):
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        require_decoder(stream, name)
        pictures = moving_pictures(container)
        promised = stream.duration and float(stream.duration * stream.time_base)
        if promised is None and pictures is None and container.duration is not None:
            promised = container.duration / av.time_base
        mixer = _Mixer(sample_rate, name)
        # Everything from here on is measured from the first frame, or from the first sound.
        clock = seconds_of(pictures.start_time, pictures.time_base) if pictures is not None else None
        for packet in packets(container, stream):
            for frame in frames_of(stream.codec_context, packet):
                time = seconds_of(frame.pts, stream.time_base)
                if clock is None:
                    clock = time
                mixer.add(frame, at=None if time is None or clock is None else time - clock)
        for frame in frames_of(stream.codec_context, None):
            mixer.add(frame, at=None)
        waveform = mixer.finish()
    if len(waveform) == 0:
        raise MediaError(f"{name}: none of its sound could be decoded. The file is damaged.")
    # Raw streams promise nothing: their duration is estimated from the first frames.
    if promised and container.format.name not in ("mp3", "aac", "ac3", "eac3"):
        warn_if_short(name, promised, len(waveform) / sample_rate, "sound")
    return _finite(waveform, name)


class _Mixer:
    """Decoded sound of any layout, format and rate → mono float32 at one rate, laid out by time."""

    def __init__(self, sample_rate: int, name: str) -> None:
        self.sample_rate = sample_rate
        self.name = name
        self.sound = bytearray()  # float32; grows in place, where a list of hours of pieces would be there twice
        self.clock: float | None = None
        self.silence = 0.0
        self.early = 0  # samples from before the start, still to be cut
        self.form: tuple[str, str, int] | None = None
        self.resampler: Any = None

    def add(self, frame: Any, at: float | None) -> None:
        """at: seconds from the start at which the frame is heard; None for right after the one before."""
        import av

        if self.clock is None:
            self.clock = min(at or 0.0, 0.0)
            self.early = round(-self.clock * self.sample_rate)
        gap = 0.0 if at is None else at - self.clock
        # Time stamps are rounded, so a small gap is none; the sound of a clip may start with any.
        if gap > (0.1 if self.resampler else 0.0):
            self.silence += gap
            if self.silence > MAX_SILENCE:
                raise MediaError(f"{self.name}: its sound claims {self.silence:.0f} s of silence. The file is damaged.")
            self._flush()
            self._put(torch.zeros(round(gap * self.sample_rate)))
            self.clock += gap
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self._flush()
            # Channels side by side: of eight and more planes PyAV 18 reads one that is not there.
            self.resampler = av.AudioResampler(format="flt", layout=form[1], rate=self.sample_rate)
            self.form = form
        self.clock += frame.samples / frame.sample_rate
        if self.clock > MAX_SECONDS:
            raise MediaError(f"{self.name}: its sound is longer than {MAX_SECONDS // 3600} hours. Cut it.")
        self._resample(frame)

    def finish(self) -> Tensor:
        self._flush()
        return torch.frombuffer(self.sound, dtype=torch.float32) if self.sound else torch.empty(0)

    def _flush(self) -> None:
        if self.resampler is not None:
            self._resample(None)
        self.resampler = self.form = None

    def _resample(self, frame: Any) -> None:
        for part in self.resampler.resample(frame):
            # The plain mean, as librosa's: libswresample's own mix to one channel is louder than its sources.
            self._put(torch.from_numpy(part.to_ndarray()).view(-1, part.layout.nb_channels).mean(dim=1))

    def _put(self, piece: Tensor) -> None:
        cut = min(self.early, len(piece))
        self.early -= cut
        self.sound += piece[cut:].numpy().tobytes()


def _resample_array(array: Tensor, rate: float, sample_rate: int) -> Tensor:
    import av

    if array.dim() != 1 or len(array) == 0 or not array.is_floating_point():
        raise MediaError(
            f"an array of sound must be (n,) floating point in [-1, 1], one channel, not {described(array)}."
        )
    if rate < 1 or rate != int(rate):
        raise MediaError(f"a sound's rate must be a whole number of samples per second, not {rate}.")
    waveform = _finite(array.detach().float(), "the sound")
    if rate == sample_rate:
        return waveform
    frame = av.AudioFrame.from_ndarray(waveform.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = int(rate)
    mixer = _Mixer(sample_rate, "the sound")
    mixer.add(frame, at=None)
    return mixer.finish()


def _finite(waveform: Tensor, name: str) -> Tensor:
    if not bool(waveform.isfinite().all()):
        raise MediaError(f"{name} has samples that are infinite or not a number.")
    return waveform
