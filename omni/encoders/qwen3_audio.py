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

WINDOWS_PER_BATCH = 4
"""Half a minute with public sizes: enough rows for full matrix speed on a CPU."""


class Qwen3AudioEncoder(AudioEncoder):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config)
        self.batch_frames = WINDOWS_PER_BATCH * config.n_window_infer
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

    def encode_batch(self, mel: Tensor, valid: Tensor) -> Tensor:
        x = self.convolve(rearrange(mel, "m (c f) -> c m f", f=self.config.chunk_frames))
        x = rearrange(x, "(w c) n d -> w (c n) d", w=WINDOWS_PER_BATCH)
        # Only the last chunk of a sound can be short, so the real positions are the first ones.
        starts = torch.arange(WINDOWS_PER_BATCH, device=mel.device) * x.shape[1]
        return self.attend(x, self.config.token_count(valid) - starts).flatten(0, 1)

    def convolve(self, mel: Tensor) -> Tensor:
        """(chunks, bins, frames) → (chunks, ceil(frames / 8), hidden), with positions that start anew in each chunk."""
        x = mel.unsqueeze(1)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        x = self.input(rearrange(x, "c d bins n -> c n (d bins)"))
        return x + sinusoids(x.shape[1], self.config.hidden_size, x.device).to(x.dtype)

    def attend(self, x: Tensor, counts: Tensor) -> Tensor:
        """(windows, positions, hidden) → (windows, positions, output_size). counts: (windows,), the real ones first."""
        real = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        # An empty window attends to itself: no softmax over nothing.
        mask = (real | (counts <= 0)[:, None])[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.output(F.gelu(self.hidden(self.norm(x))))
