"""Counts: what of a prompt decides its plan, and the ladder that they are rounded up."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

AUDIO_WINDOW = 50
"""Audio tokens in a window before the decoder (arXiv 2605.20035, Stage I)."""

TOKEN_STEPS, TOKEN_STEP = 16, 64
"""Rungs to the octave of the tokens that enter the decoder, and the least distance between two."""
TEXT_STEPS, TEXT_STEP = 4, 512
"""Rungs of text in the octave of those tokens, and the largest distance: most layers see the text among the rest, so
coarse rungs cost little."""
AUDIO_STEPS = 4
"""Rungs to the octave of audio, which is the lesser part of the tokens."""
LEAST_VIDEO_TOKENS, LEAST_AUDIO_WINDOWS, LEAST_WINDOWS = 9216, 128, 64
"""Windows are rounded to powers of two, from these on: empty ones cost next to nothing."""


@dataclass(frozen=True)
class Counts:
    """What of a prompt decides its plan.

    text: tokens of text and images. tokens: these and what of video and audio enters the decoder; audio: audio tokens
    among them, 0 where its method does not ask. video_windows, audio_windows: how many windows are looked into before
    the decoder; video_window: tokens in the largest of video (of audio: AUDIO_WINDOW). windows: between the layers, as
    `seats.selection.select` makes them; pairs: those of them with video and audio.
    """

    text: int
    tokens: int
    audio: int
    video_windows: int
    video_window: int
    audio_windows: int
    windows: int
    pairs: int

    @property
    def pool(self) -> int:
        """Slots of the whole prompt: text, then the windows of video, then those of audio."""
        return self.text + self.video_windows * self.video_window + self.audio_windows * AUDIO_WINDOW

    def joined(self, other: Counts) -> Counts:
        """What holds both."""
        return Counts(*(max(getattr(self, field.name), getattr(other, field.name)) for field in fields(Counts)))

    def rounded(self) -> Counts:
        """The next rungs of the ladder, for plans that many prompts share.

        Windows, which cost Stage I alone, have coarse rungs; tokens, which pass through the layers, fine ones.
        A modality that is not there stays away.
        """
        tokens = rung(self.tokens)
        text = _up(self.text, max(TOKEN_STEP, min(TEXT_STEP, _octave(tokens) // TEXT_STEPS)))
        rounded = Counts(
            text=tokens if self.text == self.tokens else min(text, tokens),
            tokens=tokens,
            audio=_up(self.audio, max(TOKEN_STEP, _octave(self.audio) // AUDIO_STEPS)) if self.audio else 0,
            video_windows=_doubled(self.video_windows, max(1, LEAST_VIDEO_TOKENS // self.video_window)),
            video_window=self.video_window,
            audio_windows=_doubled(self.audio_windows, LEAST_AUDIO_WINDOWS),
            windows=_doubled(self.windows, LEAST_WINDOWS),
            pairs=_doubled(self.pairs, LEAST_WINDOWS),
        )
        return replace(rounded, tokens=min(tokens, rounded.pool))


def rung(tokens: int) -> int:
    """The next rung of the ladder for tokens that pass through layers."""
    return _up(tokens, max(TOKEN_STEP, _octave(tokens) // TOKEN_STEPS))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _octave(count: int) -> int:
    """The power of two at or below a count."""
    return 1 << (count.bit_length() - 1)


def _doubled(count: int, least: int) -> int:
    """The power of two at or above a count and `least`; none stays none."""
    return 1 << (max(count, least) - 1).bit_length() if count else 0
