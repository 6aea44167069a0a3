"""What the audio encoders of both families share: the walk over sounds, Whisper's positions and blocks.

Sound runs as dense batches of a fixed number of chunks: few static shapes, whatever the duration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import AudioConfig
from omni.encoders.batches import cut
from omni.encoders.layers import LayerNorm
from omni.encoders.received import Signals, joined
from omni.layers import Call, directly, part
from seats.method import Needs


class AudioEncoder(nn.Module):
    """The walk over sounds; a family says how one is encoded, in batches of fixed size.

    A family sets `norm` and has encode_sound(mel, needs, call): (bins, frames), all valid → (token_count, output_size)
    and what a method `needs` of these tokens. `call` runs what sees tensors of static shape.
    """

    norm: LayerNorm

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config

    def encode_sound(self, mel: Tensor, needs: Needs | None, call: Call) -> tuple[Tensor, Signals | None]:
        raise NotImplementedError

    def forward(
        self, mel: Tensor, lengths: Tensor, needs: Needs | None = None, *, call: Call = directly
    ) -> tuple[Tensor, Signals | None]:
        """Encodes sounds, one after another.

        mel: (n, bins, frames) log-mel, on any device, padded to the longest of a prompt where one depends on that
        (`AudioConfig.alone_from`). lengths: (n,) valid frames of each, all at the front.
        Returns (Σ token_count, output_size) in the encoder's dtype, on its device; and what a method `needs` of them.
        """
        sounds = zip(mel, lengths.tolist(), strict=True)
        encoded = [self.encode_sound(sound[:, :length], needs, call) for sound, length in sounds]
        tokens, signals = zip(*encoded, strict=True)
        return torch.cat(tokens), joined(signals)

    def batches(self, mel: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        """Cuts (bins, n) into parts of (bins, frames) on the encoder's device, the last filled up with zeros.

        sizes: chunks of each.
        """
        for some in cut(mel, (size * self.config.chunk_frames for size in sizes), dim=1):
            yield some.to(self.norm.weight)


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """(length, channels) float32: Whisper's positions, sines in the first half and cosines in the second."""
    steps = torch.arange(channels // 2, device=device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) / (channels // 2 - 1) * steps)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Attention(nn.Module):
    def __init__(self, config: AudioConfig, *, key_bias: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=key_bias)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (parts, positions, hidden); mask: (parts, 1, 1, positions), the keys that are real."""
        q, k, v = (self.by_head(project(x)) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(rearrange(mixed, "p h n d -> p n (h d)"))

    def by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "p n (h d) -> p h n d", h=self.heads)


MAX_HALF = torch.finfo(torch.float16).max - 1000


class Block(nn.Module):
    """A block of Whisper's encoder (arXiv 2212.04356, section 2.2)."""

    def __init__(self, config: AudioConfig, *, key_bias: bool = False) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size)
        self.attention = Attention(config, key_bias=key_bias)
        self.mlp_norm = LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    @part
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        # As transformers' layers: an overflow would make all that follows NaN.
        return x.clamp(-MAX_HALF, MAX_HALF) if x.dtype == torch.float16 else x

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(parts, heads, positions, dim) each, of the block's input."""
        normed = self.attention_norm(x)
        return self.attention.by_head(self.attention.query(normed)), self.attention.by_head(self.attention.key(normed))
