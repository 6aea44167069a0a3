"""Qwen2.5-Omni's audio encoder (transformers' `Qwen2_5OmniAudioEncoder`; arXiv 2503.20215, section 2.2).

Sound is cut into chunks of two seconds that never see each other, so they run as dense batches of a fixed
number of chunks: one static shape, whatever the duration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from omni.config import AudioConfig

CHUNKS_PER_BATCH = 15
"""Thirty seconds, as Whisper hears it: enough rows for full matrix speed on a CPU."""


def token_count(mel_frames: int) -> int:
    """Audio tokens of a sound of `mel_frames` valid frames: a strided convolution, then pooled pairs."""
    return ((mel_frames - 1) // 2 - 1) // 2 + 1 if mel_frames > 0 else 0


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """(length, channels) float32: Whisper's positions, sines in the first half and cosines in the second."""
    steps = torch.arange(channels // 2, device=device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) / (channels // 2 - 1) * steps)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Attention(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (chunks, positions, hidden); mask: (chunks, 1, 1, positions), the keys that are real."""
        q, k, v = (
            rearrange(project(x), "c n (h d) -> c h n d", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(rearrange(mixed, "c h n d -> c n (h d)"))


class Block(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class AudioEncoder(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk_frames = 2 * config.n_window
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)
        # In every public checkpoint, read by nothing: kept so that parameters match it name by name.
        self.boundary = nn.Embedding(2, config.output_size)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """Encodes sounds, one after another.

        mel: (n, bins, frames) log-mel, on any device. lengths: (n,) valid frames of each, all at the front.
        Returns (Σ token_count, output_size) in the encoder's dtype, on its device.
        """
        return torch.cat([part for sound in zip(mel, lengths.tolist(), strict=True) for part in self._encode(*sound)])

    def _encode(self, mel: Tensor, length: int) -> Iterator[Tensor]:
        batch_frames = CHUNKS_PER_BATCH * self.chunk_frames
        left = token_count(length)
        for first in range(0, length, batch_frames):
            part = mel[:, first : min(first + batch_frames, length)]
            valid = torch.tensor(part.shape[1], device=self.conv1.weight.device)
            part = F.pad(part.to(valid.device), (0, batch_frames - part.shape[1]))
            tokens = self.encode_batch(rearrange(part, "m (c f) -> c m f", c=CHUNKS_PER_BATCH), valid)
            yield tokens.flatten(0, 1)[:left]
            left = max(0, left - tokens.shape[0] * tokens.shape[1])

    def encode_batch(self, mel: Tensor, valid: Tensor) -> Tensor:
        """Adjacent chunks of one sound → (chunks, chunk_frames / 4, output_size).

        mel: (chunks, bins, chunk_frames), zero after the first `valid` frames of all chunks together.
        """
        chunks, _, frames = mel.shape
        starts = torch.arange(chunks, device=mel.device) * frames
        lengths = (valid - starts)[:, None].clamp(max=frames)
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        # What the bias made of the empty tail must not reach the second convolution.
        x = x * (torch.arange(frames, device=mel.device) < lengths).unsqueeze(1)
        # Contiguous once, or every layer after it would copy: the sum keeps the strides of the convolution.
        x = rearrange(F.gelu(self.conv2(x)), "c d n -> c n d").contiguous()
        positions = x.shape[1]
        x = x + sinusoids(positions, self.config.hidden_size, x.device).to(x.dtype)
        real = torch.arange(positions, device=mel.device) < (lengths - 1) // 2 + 1
        # An empty chunk attends to itself: no softmax over nothing.
        mask = (real | (lengths <= 0))[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        x = reduce(x, "c (n two) d -> c n d", "mean", two=2)
        return self.output(self.norm(x))
