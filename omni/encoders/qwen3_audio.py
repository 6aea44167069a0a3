"""Qwen3-Omni's audio encoder (transformers' `Qwen3OmniMoeAudioEncoder`; arXiv 2509.17765, section 2.1).

Chunks of one second go through strided convolutions on their own; then those of a window of `n_window_infer` mel frames
see each other. Windows never do, so any number of them is a batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import AudioConfig
from omni.encoders.audio import AudioEncoder, Block, sinusoids
from omni.encoders.batches import batch_sizes, cut
from omni.encoders.layers import LayerNorm
from omni.encoders.received import Signals, joined, mean_keys, received_attention
from omni.layers import Call, directly
from seats.method import Needs

CHUNKS_PER_BATCH = 10
"""Ten seconds through the convolutions, whose channels are the most memory of the encoder."""
WINDOWS_PER_BATCH = 4
"""Half a minute with public sizes through the blocks: enough rows for full matrix speed on a CPU."""
CHUNKS_PER_GPU_BATCH, WINDOWS_PER_GPU_BATCH = 64, 8
"""About a minute each, as much for a GPU. The convolutions take about 0.4 GB beside the weights, in bfloat16."""

WEIGHT_WINDOW = 52
"""Tokens, four seconds, that weigh each other for the selection before the decoder (arXiv 2605.20035)."""


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
        self.norm = LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)

    def forward(
        self, mel: Tensor, lengths: Tensor, needs: Needs | None = None, *, call: Call = directly
    ) -> tuple[Tensor, Signals | None]:
        longest = mel.shape[2]
        if longest >= self.config.alone_from:
            return super().forward(mel, lengths, needs, call=call)
        # Chunks are as long as the longest of them, and convolutions see where they end: where no sound fills a
        # chunk, padding to a whole one would change the last tokens.
        mel = mel.to(self.norm.weight)
        real = torch.arange(longest, device=mel.device) < lengths.to(mel.device)[:, None]
        x = self.convolve(torch.where(real.unsqueeze(1), mel, 0))  # whatever lies behind them, NaN too
        counts = self.config.token_count(lengths).to(mel.device)
        tokens, signals = self.attend(x, counts, needs, x.shape[1])
        real = torch.arange(x.shape[1], device=mel.device) < counts[:, None]
        if signals is not None:
            received, keys = signals
            signals = Signals(received[real], None if keys is None else keys[real])
        return tokens[real], signals

    def encode_sound(self, mel: Tensor, needs: Needs | None, call: Call) -> tuple[Tensor, Signals | None]:
        count, device = self.config.token_count(mel.shape[1]), self.norm.weight.device
        chunks = -(-mel.shape[1] // self.config.chunk_frames)
        sizes = batch_sizes(chunks, device, cpu=CHUNKS_PER_BATCH, gpu=CHUNKS_PER_GPU_BATCH)
        frames = {"f": self.config.chunk_frames}
        batches = (rearrange(batch, "m (c f) -> c m f", **frames) for batch in self.batches(mel, sizes))
        # Only the last chunk of a sound can be short, so the real positions are the first ones.
        x = torch.cat([call(self.convolve, batch).flatten(0, 1) for batch in batches])[:count]
        sizes = batch_sizes(-(-count // self.window_tokens), device, cpu=WINDOWS_PER_BATCH, gpu=WINDOWS_PER_GPU_BATCH)
        left, parts = torch.tensor(count, device=device), []
        for size, batch in zip(sizes, cut(x, (size * self.window_tokens for size in sizes), dim=0), strict=True):
            counts = left - torch.arange(size, device=device) * self.window_tokens
            windows = rearrange(batch, "(w n) d -> w n d", w=size)
            parts.append(call(self.attend, windows, counts, needs, WEIGHT_WINDOW))
            left = left - len(batch)
        tokens, signals = zip(*parts, strict=True)
        whole, found = torch.cat(tokens).flatten(0, 1)[:count], joined(signals)
        if found is not None:
            received, keys = found
            found = Signals(received.flatten(), None if keys is None else keys.flatten(0, 1)).first(count)
        return whole, found

    def convolve(self, mel: Tensor) -> Tensor:
        """(chunks, bins, frames) → (chunks, ceil(frames / 8), hidden), with positions that start anew in each chunk."""
        x = mel.unsqueeze(1)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        chunks = len(x)
        x = rearrange(self.input(rearrange(x, "c d bins n -> (c n) (d bins)")), "(c n) d -> c n d", c=chunks)
        return x + sinusoids(x.shape[1], self.config.hidden_size, x.device).to(x.dtype)

    def attend(self, x: Tensor, counts: Tensor, needs: Needs | None, stretch: int) -> tuple[Tensor, Signals | None]:
        """(windows, positions, hidden) → (windows, positions, output_size). counts: (windows,), the real ones first.

        And, with `needs`, (windows, positions, …): what tokens receive from those of their stretch of so many, whatever
        the windows are.
        """
        real = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        # An empty window attends to itself: no softmax over nothing.
        mask = (real | (counts <= 0)[:, None])[:, None, None, :]
        last = cast(Block, self.blocks[-1])
        for block in self.blocks[:-1]:
            x = block(x, mask)
        found = None
        if needs is not None:
            queries, keys = last.queries_and_keys(x)
            line = (rearrange(part, "w h n d -> h (w n) d") for part in (queries, keys))
            q, k = (rearrange(part, "h (s n) d -> s h n d", n=stretch) for part in line)
            received = received_attention(q, k, real.view(-1, stretch)).view_as(real)
            found = Signals(received, mean_keys(keys, 1) if needs.keys else None)
        x = last(x, mask)
        return self.output(F.gelu(self.hidden(self.norm(x)))), found
