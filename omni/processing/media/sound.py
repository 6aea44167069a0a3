"""Containers → sound."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.processing.frames import MediaError
from omni.processing.media.decoding import WHOLE, Decoder, begins_anywhere, clip_start
from omni.processing.media.files import as_array, as_number, described, is_array, open_container, warn_if_short
from omni.processing.media.stamps import NONE, Recordings, Shift, marks, may_leap
from omni.processing.media.streams import moving_pictures, require_decoder, sound_track
from omni.processing.media.timeline import past_end, require_stretch

# A few bytes can claim any length: silence between the time stamps is believed up to six hours in all, sound up to a
# day, which is a million tokens and more.
MAX_SILENCE = 6 * 3600
MAX_SECONDS = 24 * 3600
# Seconds of sound that are cut where its time stamps go back; where they go back further, they are not believed.
OVERLAP = 2
RATES = 100, 10_000_000
# What a writer that does not know how much will come puts for the length, and everything near it.
UNKNOWN_BYTES = 2**31 - 2**16


STATING = (*WHOLE, "wav", "w64", "aiff", "caf", "au", "flac", "avi", "flv", "asf", "rm", "wv", "ape", "tta", "mpc8")
"""Formats that state how much sound there is. In others libavformat guesses: raw streams by the rate of their first
frames, what may be joined, Ogg among it, by its first and last stamps."""


class PastEndError(MediaError):
    """A stretch that begins where the sound has ended."""


def read_audio(
    source: Any,
    *,
    sample_rate: int = 16_000,
    start: float = 0.0,
    end: float | None = None,
    track: int | None = None,
    stopped: Callable[[], bool] = bool,
) -> Tensor | None:
    """(n,) float32 mono, the plain mean of the channels; None for a file without sound.

    Sample 0 is the instant of the first frame where the file has pictures: sound that starts later is
    preceded by zeros, what comes before is cut. Gaps in the time stamps are filled with zeros. Sound that is
    cut off gives what can be decoded, with a warning. Raises MediaError where nothing is left.

    start, end: the stretch in seconds, to the end of the sound where `end` is None or later. track: the number of the
    sound track, from 0 (unless given, `streams.sound_track` chooses). PastEndError where the sound ends before `start`.
    stopped: asked now and then, whether nobody wants it any more.
    The rate is changed by soxr's "HQ" filter, after the channels are mixed, as librosa does for the public processors.
    """
    sound = bytearray()  # float32; grows in place, where a list of hours of pieces would be there twice

    def put(piece: Tensor) -> None:
        nonlocal sound
        sound += piece.numpy().tobytes()

    samples = listen(source, put, sample_rate=sample_rate, start=start, end=end, track=track, stopped=stopped)
    return None if samples is None else torch.frombuffer(sound, dtype=torch.float32)


def listen(
    source: Any,
    put: Callable[[Tensor], None],
    *,
    sample_rate: int = 16_000,
    start: float = 0.0,
    end: float | None = None,
    track: int | None = None,
    stopped: Callable[[], bool] = bool,
) -> int | None:
    """`read_audio`, piece by piece: calls `put` with each and returns how many samples there were, None for a file
    without sound."""
    require_stretch(start, end, "audio")
    if isinstance(source, tuple) or is_array(source):
        if track is not None:
            raise MediaError("audio_track is for files: an array has no tracks.")
        array, rate = source if isinstance(source, tuple) and len(source) == 2 else (source, 16_000)
        waveform = _resample_array(as_array(array), rate, sample_rate)
        if start * sample_rate >= len(waveform):
            raise PastEndError(past_end("the sound", start, len(waveform) / sample_rate, "audio"))
        waveform = waveform[round(start * sample_rate) : None if end is None else max(1, round(end * sample_rate))]
        put(waveform)
        return len(waveform)
    with ExitStack() as opened:
        container, name = opened.enter_context(open_container(source, by_header=True))
        stream = sound_track(container, name, track)
        if stream is None:
            return None
        require_decoder(stream, name)
        promised = _promised(container, stream)
        added = _shifts(container, stream, name) if may_leap(container) else NONE
        # Each opening may decode a clip's first pictures: half a second at 4K.
        if may_leap(container) or begins_anywhere(container):
            opened.close()
            with open_container(source) as (sought, _):
                clock = clip_start(sought)
            container, _ = opened.enter_context(open_container(source))
            stream = sound_track(container, name, track)
        else:
            clock = clip_start(container)
        mixer = _Mixer(put, sample_rate, name, start, end)
        # Everything is measured from the first frame, or from the first sound.
        for time, frame in Decoder(stream).straight(container, added):
            if clock is None:
                clock = time
            mixer.add(frame, at=None if time is None or clock is None else time - clock)
            if mixer.full or stopped():
                break
        mixer.finish()
    if mixer.clock is None:
        raise MediaError(f"{name}: none of its sound could be decoded. The file is damaged.")
    if promised is not None and not mixer.full:
        warn_if_short(name, promised, mixer.clock - mixer.first, "sound")
    if mixer.samples == 0:
        if start:
            raise PastEndError(past_end(name, start, mixer.clock, "audio"))
        raise MediaError(f"{name}: all of its sound comes before its first frame. Cut it anew, or give it as a sound.")
    return mixer.samples


def _promised(container: Any, stream: Any) -> float | None:
    """Seconds of sound that the file's header states; None where it states none, or what stands for none."""
    import av

    if container.format.name not in STATING:
        return None
    seconds = None if stream.duration is None else float(stream.duration * stream.time_base)
    if seconds is None and moving_pictures(container) is None and container.duration is not None:
        seconds = container.duration / av.time_base
    if seconds is not None and seconds * (stream.codec_context.bit_rate or 0) / 8 >= UNKNOWN_BYTES:
        return None
    return seconds


def _shifts(container: Any, stream: Any, name: str) -> list[Shift]:
    """What to add to the time stamps of a sound track where recordings are joined."""
    pictures, usual = moving_pictures(container), sound_track(container, name, None) or stream
    streams = {each.index: each for each in (pictures, usual, stream) if each is not None}
    found = marks(container, *streams.values())
    seen = [] if pictures is None else found[pictures.index]
    return Recordings(seen, found[usual.index]).shifts(found[stream.index])


class _Mixer:
    """Decoded sound of any layout, format and rate → mono float32 at one rate, laid out by time, from `start` to `end`
    in seconds."""

    def __init__(
        self,
        put: Callable[[Tensor], None],
        sample_rate: int,
        name: str,
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        self.put = put
        self.sample_rate = sample_rate
        self.name = name
        self.samples = 0
        self.clock: float | None = None
        self.first = 0.0
        self.silence = 0.0
        self.start = round(start * sample_rate)
        self.most = math.inf if end is None else max(1, round(end * sample_rate) - self.start)
        self.early = 0  # samples from before the start, still to be cut
        self.form: tuple[str, str, int] | None = None
        self.unpacker: Any = None
        self.resampler: _Resampler | None = None

    @property
    def full(self) -> bool:
        return self.samples >= self.most

    def add(self, frame: Any, at: float | None) -> None:
        """at: seconds from the start at which the frame is heard; None for right after the one before."""
        import av

        if self.clock is None:
            self.first = at or 0.0
            self.clock = min(self.first, 0.0)
            self.early = round(-self.clock * self.sample_rate) + self.start
        gap = 0.0 if at is None else at - self.clock
        # Time stamps are rounded, so a small gap is none; the sound of a clip may start with any.
        if gap > (0.1 if self.resampler else 0.0):
            self.silence += gap
            if self.silence > MAX_SILENCE:
                raise MediaError(f"{self.name}: its sound claims {self.silence:.0f} s of silence. The file is damaged.")
            self._flush()
            self._put(torch.zeros(round(gap * self.sample_rate)))
            self.clock += gap
        elif -OVERLAP < gap < -0.1:  # the end of one recording, and the beginning of the next
            self.early += round(-gap * self.sample_rate)
            self.clock += gap
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self._flush()
            # Channels side by side: of eight and more planes PyAV 18 reads one that is not there.
            self.unpacker = av.AudioResampler(format="flt", layout=form[1], rate=form[2])
            self.resampler = _Resampler(form[2], self.sample_rate, self.name)
            self.form = form
        self.clock += frame.samples / frame.sample_rate
        if self.clock > MAX_SECONDS:
            raise MediaError(f"{self.name}: its sound is longer than {MAX_SECONDS // 3600} hours. Cut it.")
        assert self.resampler is not None
        for part in self.unpacker.resample(frame):
            # The plain mean, as librosa's: libswresample's own mix to one channel is louder than its sources.
            mono = torch.from_numpy(part.to_ndarray()).view(-1, part.layout.nb_channels).mean(dim=1)
            self._put(self.resampler.push(mono))

    def finish(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self.resampler is not None:
            self._put(self.resampler.end())
        self.resampler = self.form = None

    def _put(self, piece: Tensor) -> None:
        cut = min(self.early, len(piece))
        self.early -= cut
        room = self.most - self.samples
        piece = piece[cut : None if room == math.inf else cut + int(room)]
        if len(piece):
            self.samples += len(piece)
            self.put(_finite(piece, self.name))


class _Resampler:
    """Mono sound of one rate, piece by piece → another rate: soxr's "HQ" filter, and librosa's length, which is the
    next whole sample."""

    def __init__(self, rate: int, sample_rate: int, name: str) -> None:
        import soxr

        if not RATES[0] <= rate <= RATES[1]:
            raise MediaError(f"{name}: its sound has {rate} samples a second, {RATES[0]} to {RATES[1]} can be read.")
        self.rate, self.sample_rate = rate, sample_rate
        self.stream = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        self.taken = self.given = 0

    def push(self, mono: Tensor) -> Tensor:
        self.taken += len(mono)
        if self.stream is None:
            return mono
        return self._give(torch.from_numpy(self.stream.resample_chunk(mono.contiguous().numpy())))

    def end(self) -> Tensor:
        if self.stream is None:
            return torch.empty(0)
        rest = self._give(torch.from_numpy(self.stream.resample_chunk(torch.empty(0).numpy(), last=True)))
        missing = -(-self.taken * self.sample_rate // self.rate) - self.given
        return F.pad(rest, (0, missing))  # of less than nothing it cuts

    def _give(self, piece: Tensor) -> Tensor:
        self.given += len(piece)
        return piece


def _resample_array(array: Tensor, rate: Any, sample_rate: int) -> Tensor:
    if array.dim() != 1 or len(array) == 0 or not array.is_floating_point():
        raise MediaError(
            f"an array of sound must be (n,) floating point in [-1, 1], one channel, not {described(array)}."
        )
    number = as_number(rate)
    if not (1 <= number < math.inf and number.is_integer()):
        raise MediaError(f"a sound's rate must be a whole number of samples per second, not {rate!r:.80}.")
    waveform = _finite(array.detach().float(), "the sound")
    if number == sample_rate:
        return waveform
    resampler = _Resampler(int(number), sample_rate, "the sound")
    return torch.cat([resampler.push(waveform), resampler.end()])


def _finite(waveform: Tensor, name: str) -> Tensor:
    if not bool(waveform.isfinite().all()):
        raise MediaError(f"{name} has samples that are infinite or not a number.")
    return waveform
