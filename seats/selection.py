"""Stage II: which tokens survive between decoder layers, given their relevance (arXiv 2605.20035)."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seats.budget import keep_counts, split_budgets, window_budgets
from seats.method import require_ratio

TEXT, VIDEO, AUDIO, PADDING = range(4)


def select_by_relevance(
    scores: Tensor,
    modality: Tensor,
    video_keep_ratio: float,
    audio_keep_ratio: float,
    temperature: float,
    clip: Tensor | None = None,
) -> Tensor:
    """The tokens of one sequence that a selection keeps: sorted indices, int64.

    scores: (S,) relevance. modality: (S,) integers: 0 text, 1 video, 2 audio. clip: (S,) int64, of which clip or sound
    a token is, rising along the prompt, any number for text; None where all are of one clip. Of the rest see `select`.
    Raises ValueError for shapes, ratios or a temperature out of range.
    """
    if scores.dim() != 1 or scores.shape != modality.shape or not len(scores):
        raise ValueError(
            "scores and modality must both be (S,), S at least 1, "
            f"not {tuple(scores.shape)} and {tuple(modality.shape)}."
        )
    if clip is not None:
        if clip.shape != scores.shape:
            raise ValueError(f"clip must be {tuple(scores.shape)} as scores, not {tuple(clip.shape)}.")
        media = (modality == VIDEO) | (modality == AUDIO)
        if bool((clip[media].diff() < 0).any()):
            raise ValueError("clip must count the clips and sounds in their order: it may not fall along the sequence.")
        clip = torch.zeros_like(clip).masked_scatter(media, clip[media].unique(return_inverse=True)[1])
    require_ratio("video_keep_ratio", video_keep_ratio)
    require_ratio("audio_keep_ratio", audio_keep_ratio)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}.")
    windows, _ = count_windows(modality, clip)
    owner = None if clip is None else clip[None]
    keep = select(scores[None], modality[None], video_keep_ratio, audio_keep_ratio, temperature, max(1, windows), owner)
    return keep[0].nonzero().squeeze(-1)


def select(
    scores: Tensor,
    modality: Tensor,
    video_keep_ratio: float | Tensor,
    audio_keep_ratio: float | Tensor,
    temperature: float,
    max_windows: int,
    clip: Tensor | None = None,
) -> Tensor:
    """Which tokens a selection keeps: (B, S) bool, with static shapes and no host read.

    scores: (B, S) float32 relevance. modality: (B, S) uint8: 0 text, all kept; 1 video; 2 audio; 3 padding, at the
    end, none kept. Ratios may be tensors, () float64.

    A run is adjacent tokens of one modality. Inside a clip the i-th video and the i-th audio run form a window; runs
    left over, those of a silent clip and those of a sound of its own are windows without the other modality. Windows
    share K = K_v + K_a tokens by the softmax of their mean relevance over `temperature`, where K_v is
    `video_keep_ratio` of the video tokens, and keep the most relevant. With one window or one modality the most
    relevant K_v video and K_a audio tokens of the sequence stay. In all, at least K and at most max(K, W) + W for W
    windows. Ties go to the lower index.

    clip: (B, S) int64, of which clip or sound a token is, counted from 0 in the order of the prompt, any number for
    text and padding; None where all are of one clip, as in the paper.
    max_windows: at least the number of windows in every row; runs past it join the last window, so a caller that
    wants the runs apart counts them beforehand.
    """
    is_media = (modality == VIDEO) | (modality == AUDIO)
    kind = (modality == AUDIO).long()
    window, windows, runs = windows_of(modality, clip, max_windows)
    whole = (windows <= 1) | (runs == 0).any(dim=-1)  # rows ranked as one window
    window = window.masked_fill(whole[:, None], 0)

    # A group is a modality's tokens in one window; text and padding are in a last group that keeps nothing.
    group = torch.where(is_media, kind * max_windows + window, 2 * max_windows)
    tokens = grouped_sum(is_media.long(), group, max_windows)  # (B, 2, W)
    keep = torch.stack(
        (keep_counts(tokens[:, 0].sum(-1), video_keep_ratio), keep_counts(tokens[:, 1].sum(-1), audio_keep_ratio)), 1
    )  # (B, 2)
    # Sums in float64: whatever the order of the additions, they round to the same float32.
    means = (grouped_sum(scores.double(), group, max_windows) / tokens.clamp(min=1)).float()
    present = torch.arange(max_windows, device=scores.device) < windows.clamp(min=1)[:, None]
    shares = (means / temperature).masked_fill(~present[:, None], float("-inf")).softmax(dim=-1)  # (B, 2, W)
    budgets = window_budgets(shares.sum(dim=1) / 2, tokens.sum(dim=1), keep.sum(dim=1))
    claims = shares * keep[..., None]
    video_share = claims[:, 0] / (claims.sum(dim=1) + 1e-12)
    limits = torch.stack(split_budgets(budgets, video_share, tokens[:, 0], tokens[:, 1]), dim=1)
    limits = torch.where(whole[:, None, None], keep[..., None].minimum(tokens), limits)
    limit = F.pad(limits.flatten(1), (0, 1)).gather(-1, group)
    return (modality == TEXT) | (rank_in_group(scores, group) < limit)


def windows_of(modality: Tensor, clip: Tensor | None, max_windows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which window each token is in, as `select` numbers them: clip after clip, in each by runs.

    Returns window (B, S) int64, of any value below max_windows for text and padding; how many there are (B,); and
    runs of video and of audio (B, 2). Arguments: `select`.
    """
    clip = torch.zeros_like(modality, dtype=torch.long) if clip is None else clip.long()
    changes = run_starts(modality) | F.pad(clip[:, 1:] != clip[:, :-1], (1, 0))
    begins = torch.stack([changes & (modality == medium) for medium in (VIDEO, AUDIO)], dim=1).long()  # (B, 2, S)
    # A clip has a window at least, so there are no more clips than windows.
    clip = clip.clamp(0, max_windows - 1)[:, None].expand(-1, 2, -1)
    of_clip = begins.new_zeros(len(begins), 2, max_windows).scatter_add(-1, clip, begins)
    windows = of_clip.amax(dim=1)
    # From the number of a run in the sequence to that of its window.
    shift = (windows.cumsum(dim=-1) - windows)[:, None] - (of_clip.cumsum(dim=-1) - of_clip)
    window = begins.cumsum(dim=-1) - 1 + shift.gather(-1, clip)
    window = window.gather(1, (modality == AUDIO).long()[:, None]).squeeze(1)
    return window.clamp(0, max_windows - 1), windows.sum(dim=-1), of_clip.sum(dim=-1)


def count_windows(modality: Tensor, clip: Tensor | None = None) -> tuple[int, int]:
    """Windows of one sequence, and those of them that have both modalities. Arguments: `select_by_relevance`."""
    runs: dict[int, list[int]] = {}
    numbers = modality.tolist() if clip is None else zip(modality.tolist(), clip.tolist(), strict=True)
    for each, _ in groupby(numbers):
        kind, number = each if isinstance(each, tuple) else (each, 0)
        if kind in (VIDEO, AUDIO):
            runs.setdefault(number, [0, 0])[kind == AUDIO] += 1
    return sum(map(max, runs.values())), sum(map(min, runs.values()))


def run_starts(modality: Tensor) -> Tensor:
    """Where a run of adjacent equal modality begins: (B, S) → (B, S) bool."""
    first = torch.ones_like(modality[:, :1], dtype=torch.bool)
    return torch.cat((first, modality[:, 1:] != modality[:, :-1]), dim=-1)


def grouped_sum(values: Tensor, group: Tensor, max_windows: int) -> Tensor:
    """Sums (B, S) values by group into (B, 2, max_windows)."""
    sums = values.new_zeros(len(values), 2 * max_windows + 1).scatter_add(-1, group, values)
    return rearrange(sums[:, :-1], "b (kind window) -> b kind window", kind=2)


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """How many tokens of its group come before each token, by falling score, then by index: (B, S) int64."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, group.gather(-1, by_score).argsort(dim=-1, stable=True))
    sorted_group = group.gather(-1, order)
    place = torch.arange(scores.shape[-1], device=scores.device) - torch.searchsorted(sorted_group, sorted_group)
    return torch.empty_like(order).scatter(-1, order, place)


def highest_of_each(scores: Tensor, kind: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """All of the text, and of the whole sequence so many video and audio tokens of the highest score: (B, S) bool.

    scores, kind: as in `select`. video, audio: (B,) int64. Ties go to the lower index.
    """
    none = torch.zeros_like(video)
    limits = torch.stack((none, video, audio, none), dim=1)
    group = kind.long()
    return (kind == TEXT) | (rank_in_group(scores, group) < limits.gather(1, group))


def compact(keep: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The indices of what is kept, in order, in a fixed number of slots.

    keep: (B, S) bool. Returns index (B, slots) int64 and count (B,) int64, how many slots are real. Slots past the
    count repeat position 0. Survivors that find no slot, the last ones, are left out.
    """
    slot = (keep.cumsum(dim=-1) - 1).masked_fill(~keep, slots).clamp(max=slots)
    position = torch.arange(keep.shape[-1], device=keep.device).expand_as(slot)
    index = slot.new_zeros(len(keep), slots + 1).scatter(-1, slot, position)  # the last column takes what is left out
    return index[:, :slots], keep.sum(dim=-1).clamp(max=slots)
