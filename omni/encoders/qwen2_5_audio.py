"""Qwen2.5-Omni's audio encoder (transformers' `Qwen2_5OmniAudioEncoder`; arXiv 2503.20215, section 2.2).

Chunks of two seconds never see each other, so any number of them is a batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from omni.config import AudioConfig
from omni.encoders.audio import AudioEncoder, Block, sinusoids
from omni.encoders.batches import batch_sizes
from omni.encoders.layers import LayerNorm
from omni.encoders.received import Signals, joined, mean_keys, received_attention
from omni.layers import Call
from seats.method import Needs

CHUNKS_PER_BATCH = 15
"""Thirty seconds, as Whisper hears it: enough rows for full matrix speed on a CPU."""
CHUNKS_PER_GPU_BATCH = 32
"""About a minute, as much for a GPU. It takes about 0.1 GB beside the weights, in bfloat16."""


class Qwen25AudioEncoder(AudioEncoder):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)
        # In every public checkpoint, read by nothing: kept so that parameters match it name by name.
        self.boundary = nn.Embedding(2, config.output_size)

    def encode_sound(self, mel: Tensor, needs: Needs | None, call: Call) -> tuple[Tensor, Signals | None]:
        left = torch.tensor(mel.shape[1], device=self.norm.weight.device)
        chunks = -(-mel.shape[1] // self.config.chunk_frames)
        sizes = batch_sizes(chunks, left.device, cpu=CHUNKS_PER_BATCH, gpu=CHUNKS_PER_GPU_BATCH)
        parts = []
        for batch in self.batches(mel, sizes):
            parts.append(call(self.encode_batch, batch, left, needs))
            left = left - batch.shape[1]
        tokens, signals = zip(*parts, strict=True)
        count, found = self.config.token_count(mel.shape[1]), joined(signals)
        return torch.cat(tokens)[:count], found and found.first(count)

    def encode_batch(self, mel: Tensor, valid: Tensor, needs: Needs | None) -> tuple[Tensor, Signals | None]:
        """(bins, chunks · frames), zero after the first `valid` → (tokens, output_size), the valid ones first.

        And, with `needs`, what the positions of a chunk ask of each other, means over pooled pairs.
        """
        mel = rearrange(mel, "m (c f) -> c m f", f=self.config.chunk_frames)
        chunks, _, frames = mel.shape
        starts = torch.arange(chunks, device=mel.device) * frames
        lengths = (valid - starts)[:, None].clamp(max=frames)
        x = F.gelu(self.conv1(mel))
        # What the bias made of the empty tail must not reach the second convolution.
        x = x * (torch.arange(frames, device=mel.device) < lengths).unsqueeze(1)
        # Contiguous once, or every layer after it would copy: the sum keeps the strides of the convolution.
        x = rearrange(F.gelu(self.conv2(x)), "c d n -> c n d").contiguous()
        positions = x.shape[1]
        x = x + sinusoids(positions, self.config.hidden_size, x.device).to(x.dtype)
        real = torch.arange(positions, device=mel.device) < (lengths - 1) // 2 + 1
        # An empty chunk attends to itself: no softmax over nothing.
        mask = (real | (lengths <= 0))[:, None, None, :]
        last = cast(Block, self.blocks[-1])
        for block in self.blocks[:-1]:
            x = block(x, mask)
        found = None
        if needs is not None:
            q, k = last.queries_and_keys(x)
            received = reduce(received_attention(q, k, real), "c (n two) -> (c n)", "mean", two=2)
            found = Signals(received, mean_keys(k, 2).flatten(0, 1) if needs.keys else None)
        x = reduce(last(x, mask), "c (n two) d -> (c n) d", "mean", two=2)
        return self.output(self.norm(x)), found
