"""The thinker as one module: encoders, decoder, head (transformers' `Qwen2_5OmniThinkerForConditionalGeneration`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from omni.cache import Cache
from omni.config import OmniConfig
from omni.decoder import Layer
from omni.encoders.audio import AudioEncoder
from omni.encoders.vision import VisionEncoder
from omni.inputs import Inputs
from omni.layers import RMSNorm
from omni.processing.positions import Layout
from omni.rope import multimodal_rotary


class Thinker(nn.Module):
    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.vision = VisionEncoder(config.vision)
        self.audio = AudioEncoder(config.audio)
        self.embedding = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(Layer(decoder) for _ in range(decoder.num_layers))
        self.norm = RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.head = (
            None if decoder.tie_word_embeddings else nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        )

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Media tokens by modality, each (n, hidden) in the order of the prompt; absent media are absent."""
        features = {}
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            features["image"] = self.vision(inputs.pixel_values, inputs.image_grid_thw)
        if inputs.pixel_values_videos is not None and inputs.video_grid_thw is not None:
            features["video"] = self.vision(inputs.pixel_values_videos, inputs.video_grid_thw)
        if inputs.input_features is not None:
            features["audio"] = self.audio(inputs.input_features, inputs.mel_lengths)
        return features

    def embed(self, inputs: Inputs, layout: Layout, features: dict[str, Tensor]) -> Tensor:
        """(1, S, hidden): text embeddings with the media tokens in the places of their placeholders."""
        device = self.embedding.weight.device
        x = self.embedding(inputs.input_ids.to(device))
        for modality, tokens in features.items():
            x[0].index_copy_(0, getattr(layout, modality).to(device), tokens.to(x.dtype))
        return x

    def forward(self, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Runs the decoder over new positions and appends them to the cache.

        x: (B, S, hidden): a whole prompt into an empty cache, or one token (S = 1).
        positions: (3, B, S). Returns the logits after the last position, (B, vocab) float32.
        """
        decoder = self.config.decoder
        cos, sin = multimodal_rotary(positions, decoder.head_dim, decoder.rope_theta, decoder.mrope_section)
        rotary = (cos.unsqueeze(1), sin.unsqueeze(1))  # the same for every head
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, cache, index)
        cache.advance(x.shape[1])
        return self.logits(x[:, -1])

    def logits(self, x: Tensor) -> Tensor:
        """(B, hidden) of the last layer → (B, vocab) float32."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), weight).float()
