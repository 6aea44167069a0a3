"""Sound → log-mel spectrogram, as transformers' WhisperFeatureExtractor makes it (arXiv 2212.04356, 2.2)."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.processing.frames import MediaError

SAMPLE_RATE = 16_000
WINDOW = 400
HOP = 160
# Frames whose bins are summed at a time, and whose sound is transformed: 41 and 5 seconds.
BLOCK, AT_ONCE = 4096, 512


def log_mel(waveform: Tensor, bins: int = 128, padded_to: int | None = None) -> Tensor:
    """(n,) float32 mono at 16 kHz → (bins, ceil(n / 160)) float32: one frame per 10 ms.

    The values of the public extractor on the frames that its attention mask keeps: windows of 25 ms are
    centred on multiples of 10 ms, mirrored before the start, and the dynamic range is cut at 80 dB below the loudest
    bin. Any length: nothing is truncated, and working memory is bounded.

    padded_to: what the extractor pads a sound with zeros to. Qwen2.5-Omni's processor pads far (None). Qwen3-Omni's
    pads to the longest sound of the prompt, mirrors what comes after, and drops the frame that is not full: then the
    longest sound has floor(n / 160) frames.
    """
    if waveform.dim() != 1 or waveform.numel() == 0 or not waveform.is_floating_point():
        raise MediaError(
            f"a waveform must be (n,) floating point, n > 0, not {tuple(waveform.shape)} {waveform.dtype}."
        )
    mel = LogMel(bins)
    mel.push(waveform)
    return mel.finish(padded_to)


class LogMel:
    """`log_mel` of sound that comes piece by piece: of an hour, 184 MB of spectrum are held, and 5 of sound.

    samples: how many came.
    """

    def __init__(self, bins: int = 128) -> None:
        self.bins = bins
        self.samples = 0
        self.frames = 0
        self.power = bytearray()  # (frames, bins) float32; grows in place
        self.sound = torch.empty(0)  # from the beginning of the next frame's window on
        self.pieces: list[Tensor] = []  # what follows

    def push(self, waveform: Tensor) -> None:
        for piece in waveform.float().split(BLOCK * HOP):
            self.pieces.append(piece)
            self.samples += len(piece)
            # What is mirrored at the end stays.
            if self.samples - self.frames * HOP > BLOCK * HOP + 2 * WINDOW:
                self._join()
                self._transform(BLOCK)

    def finish(self, padded_to: int | None = None) -> Tensor:
        """What `log_mel` returns of all that came: more than nothing, at most `padded_to`. The last call."""
        half = WINDOW // 2
        # Windows reach past the end of the sound: the loudest bin is sought in all that touch it.
        frames, touching = -(-self.samples // HOP), (self.samples + half - 1) // HOP + 1
        if padded_to is not None:
            frames, touching = (min(count, padded_to // HOP) for count in (frames, touching))
            if frames == 0:
                return torch.empty(self.bins, 0)
        self._join()
        # From here on a place is one in `sound`.
        before = self.frames * HOP - half
        needed = (touching - 1) * HOP + half - before
        heard = needed if padded_to is None else min(needed, padded_to - before)  # with zeros after the end
        sound = torch.zeros(needed)
        sound[: min(heard, len(self.sound))] = self.sound[:heard]
        end = sound[max(0, 2 * heard - 1 - needed) : heard - 1].flip(0)  # the rest is mirrored
        sound[heard:][: len(end)] = end
        self.sound = sound
        while self.frames < touching:
            self._transform(min(BLOCK, touching - self.frames))
        mel = torch.frombuffer(self.power, dtype=torch.float32).view(touching, self.bins)
        mel.clamp_(min=1e-10).log10_()
        loudest = mel.max()
        return mel.clamp_(min=loudest - 8).add_(4).div_(4).T[:, :frames]

    def _join(self) -> None:
        self.sound = torch.cat((self.sound, *self.pieces))
        self.pieces.clear()
        if self.frames == 0:
            half = WINDOW // 2
            start = F.pad(self.sound[1 : half + 1], (0, max(0, half + 1 - len(self.sound)))).flip(0)
            self.sound = torch.cat((start, self.sound))

    def _transform(self, frames: int) -> None:
        """Takes the first frames of `sound`."""
        taper, power = torch.hann_window(WINDOW), torch.empty(frames, WINDOW // 2 + 1)
        windows = self.sound.unfold(0, WINDOW, HOP)[:frames]
        for some, into in zip(windows.split(AT_ONCE), power.split(AT_ONCE), strict=True):
            waves = torch.fft.rfft(some * taper)
            torch.addcmul(waves.real.square(), waves.imag, waves.imag, out=into)  # a third of abs().square()'s time
        self.power += memoryview((power @ mel_filters(self.bins).T).numpy()).cast("B")
        self.sound = self.sound[frames * HOP :].clone()
        self.frames += frames


@cache
def mel_filters(bins: int) -> Tensor:
    """(bins, 201) float32: triangles of equal area, their corners evenly spaced in mels from 0 to 8 kHz.

    Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, 15 mels, then 27 mels per factor of 6.4.
    """
    knee, per_log = 15.0, 27 / math.log(6.4)
    top = knee + per_log * math.log(SAMPLE_RATE / 2 / 1000)
    mels = torch.linspace(0, top, bins + 2, dtype=torch.float64)
    corners = torch.where(mels < knee, mels * 200 / 3, 1000 * ((mels - knee) / per_log).exp())
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    left, centre, right = (corners[i : i + bins, None] for i in range(3))
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()
