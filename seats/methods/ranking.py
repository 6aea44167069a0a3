"""What several methods are made of: the highest scores, at random, and budgets that leave sound whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seats.method import Kept, Media


def highest(scores: Tensor, there: Tensor, counts: Tensor) -> Tensor:
    """The highest `counts` scores of every row, among those that are there: (..., N) bool.

    scores, there: (..., N). counts: (...) int64. Ties go to the lower index.
    """
    order = scores.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter(-1, order, place)
    return there & (rank < counts[..., None])


def noise(count: int, device: torch.device) -> Tensor:
    """(count,) float32, shuffled but the same whenever it is asked for: the choice of what is left to chance.

    Arithmetic on indices, since a random generator of the device would be a state of the graph.
    """
    bits = torch.arange(1, count + 1, device=device)
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B & 0xFFFFFFFF
    return ((bits >> 16) ^ bits).float()


def part(tokens: Tensor, ratio: float | Tensor) -> Tensor:
    """max(1, int(ratio · tokens)) of so many tokens, all at most, 0 of none: int64."""
    return (ratio * tokens.double()).long().clamp(min=1).minimum(tokens)


def sound_intact(
    video: Tensor, audio: Tensor, video_ratio: float, audio_ratio: float, floor: float | Tensor = 0.05
) -> tuple[Tensor, Tensor]:
    """The ratios of a method made for pictures, at the budget of these two ratios (arXiv 2605.20035, its code).

    video, audio: (B,) int64 tokens. All of the sound is kept, and of video what the budget leaves, but not less than
    `floor`, a number or (B,) float64; sound gives the difference. Returns the ratios of video and of sound, (B,)
    float64.
    """
    v, a = video.double(), audio.double()
    total = (v * video_ratio + a * audio_ratio).trunc()
    least = floor if isinstance(floor, Tensor) else torch.full_like(v, floor)
    of_video = ((total - a) / v.clamp(min=1)).maximum(least)
    of_audio = torch.where(of_video > least, 1.0, (total - least * v) / a.clamp(min=1))
    of_audio = torch.where(of_video > 1, (total - v) / a.clamp(min=1), of_audio).clamp(max=1)
    # Without one of them, the ratios stay as they are.
    both = (video > 0) & (audio > 0)
    return torch.where(both, of_video.clamp(max=1), video_ratio), torch.where(both, of_audio, audio_ratio)


def take_any(media: Media, counts: Tensor) -> Tensor:
    """So many tokens of a modality of each prompt, (B,) int64, any of them: (B, W, n) bool."""
    there = media.there.flatten(1)
    # By a token's number, not by its slot, which depends on how large the frames of others in the batch are.
    number = (there.cumsum(dim=1) - 1).clamp(min=0)
    chance = noise(there.shape[1], there.device)[number]
    return highest(chance, there, counts).view(media.received.shape)


def apart(
    keep: Callable[[Media, float], Kept], video: Media | None, audio: Media | None, ratios: tuple[float, float]
) -> tuple[Kept | None, Kept | None]:
    """Both modalities by themselves, as `Method.before` returns them."""
    of_video, of_audio = (
        None if media is None else keep(media, ratio) for media, ratio in zip((video, audio), ratios, strict=True)
    )
    return of_video, of_audio


def intact(
    keep: Callable[[Media, Tensor], Kept],
    video: Media | None,
    audio: Media | None,
    ratios: tuple[float, float],
    floor: float | Tensor = 0.05,
) -> tuple[Kept | None, Kept | None]:
    """Video at what `sound_intact` leaves it, (B,) float64, and any of the tokens of sound, mostly all."""
    tokens = tokens_of(video, audio)
    of_video, of_audio = sound_intact(*tokens, *ratios, floor)
    kept_video = None if video is None else keep(video, of_video)
    return kept_video, None if audio is None else Kept(take_any(audio, part(tokens[1], of_audio)))


def tokens_of(video: Media | None, audio: Media | None) -> tuple[Tensor, Tensor]:
    """How many each prompt has of video and of sound: (B,) int64 each."""
    some = video or audio
    assert some is not None
    none = some.sizes.new_zeros(len(some.sizes))
    of_video, of_audio = (none if media is None else media.sizes.sum(dim=-1) for media in (video, audio))
    return of_video, of_audio


def unit(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1 in float32."""
    features = features.float()
    return features / (features.norm(dim=-1, keepdim=True) + eps)
