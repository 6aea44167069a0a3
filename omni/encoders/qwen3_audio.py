"""Qwen3-Omni's audio encoder (transformers' `Qwen3OmniMoeAudioEncoder`; arXiv 2509.17765, section 2.1).

Chunks of one second go through strided convolutions on their own; then those of a window of `n_window_infer` mel frames
see each other. Windows never do, so any number of them is a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import AudioConfig
from omni.encoders.audio import AudioEncoder, Block, sinusoids

CHUNKS_PER_BATCH = 10
"""Ten seconds through the convolutions, whose channels are the most memory of the encoder."""
WINDOWS_PER_BATCH = 4
"""Half a minute with public sizes through the blocks: enough rows for full matrix speed on a CPU."""


class Qwen3AudioEncoder(AudioEncoder):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config)
        self.window_tokens = config.token_count(config.n_window_infer)
        channels, bins = config.conv_channels, config.num_mel_bins
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, channels, kernel_size=3, stride=2, padding=1) for inputs in (1, channels, channels)
        )
        self.input = nn.Linear(channels * -(-bins // 8), config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config, key_bias=True) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        if longest >= self.config.chunk_frames:
            return super().forward(mel, lengths)
        # Chunks are as long as the longest of them, and convolutions see where they end: where no sound fills a
        # chunk, padding to a whole one would change the last tokens.
        mel = mel[..., :longest].to(self.norm.weight)
        real = torch.arange(longest, device=mel.device) < lengths.to(mel.device)[:, None]
        counts = [self.config.token_count(length) for length in lengths.tolist()]
        tokens = self.attend(self.convolve(mel * real.unsqueeze(1)), torch.tensor(counts, device=mel.device))
        return torch.cat([sound[:count] for sound, count in zip(tokens, counts, strict=True)])

    def encode_sound(self, mel: Tensor) -> Tensor:
        count, frames = self.config.token_count(mel.shape[1]), CHUNKS_PER_BATCH * self.config.chunk_frames
        chunks = (rearrange(batch, "m (c f) -> c m f", c=CHUNKS_PER_BATCH) for batch in self.batches(mel, frames))
        # Only the last chunk of a sound can be short, so the real positions are the first ones.
        x = torch.cat([self.convolve(batch).flatten(0, 1) for batch in chunks])[:count]
        starts = torch.arange(WINDOWS_PER_BATCH, device=x.device) * self.window_tokens
        parts = []
        for batch in x.split(WINDOWS_PER_BATCH * self.window_tokens):
            padded = F.pad(batch, (0, 0, 0, WINDOWS_PER_BATCH * self.window_tokens - len(batch)))
            windows = rearrange(padded, "(w n) d -> w n d", w=WINDOWS_PER_BATCH)
            parts.append(self.attend(windows, len(batch) - starts).flatten(0, 1)[: len(batch)])
        return torch.cat(parts)

    def convolve(self, mel: Tensor) -> Tensor:
        """(chunks, bins, frames) → (chunks, ceil(frames / 8), hidden), with positions that start anew in each chunk."""
        x = mel.unsqueeze(1)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        chunks = len(x)
        x = rearrange(self.input(rearrange(x, "c d bins n -> (c n) (d bins)")), "(c n) d -> c n d", c=chunks)
        return x + sinusoids(x.shape[1], self.config.hidden_size, x.device).to(x.dtype)

    def attend(self, x: Tensor, counts: Tensor) -> Tensor:
        """(windows, positions, hidden) → (windows, positions, output_size). counts: (windows,), the real ones first."""
        real = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        # An empty window attends to itself: no softmax over nothing.
        mask = (real | (counts <= 0)[:, None])[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.output(F.gelu(self.hidden(self.norm(x))))
