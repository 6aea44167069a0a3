"""The thinker as one module: encoders, decoder, head (transformers' `Qwen2_5OmniThinkerForConditionalGeneration`,
`Qwen3OmniMoeThinkerForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from omni.cache import Cache
from omni.config import QWEN2_5, QWEN3, OmniConfig
from omni.decoder import Layer
from omni.encoders.qwen2_5_audio import Qwen25AudioEncoder
from omni.encoders.qwen2_5_vision import Qwen25VisionEncoder
from omni.encoders.qwen3_audio import Qwen3AudioEncoder
from omni.encoders.qwen3_vision import Qwen3VisionEncoder
from omni.encoders.received import Signals, joined
from omni.inputs import Inputs, Medium
from omni.layers import Call, Linear, RMSNorm, directly, float32_linear, part
from omni.rope import multimodal_rotary
from seats.method import Needs

ENCODERS = {QWEN2_5: (Qwen25VisionEncoder, Qwen25AudioEncoder), QWEN3: (Qwen3VisionEncoder, Qwen3AudioEncoder)}


class Thinker(nn.Module):
    """The parameters of a checkpoint and what runs them one step at a time: encoders, embedding, decoder layers, head.

    The stages of a prefill, with what a method selects between the layers, are in `omni.stages`.
    """

    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        vision, audio = ENCODERS[config.family]
        self.vision, self.audio = vision(config.vision), audio(config.audio)
        self.embedding = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(Layer(decoder, index) for index in range(decoder.num_layers))
        self.norm = RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.head = None if decoder.tie_word_embeddings else Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    def encode(
        self, inputs: Inputs, needs: Needs | None = None, *, call: Call = directly
    ) -> tuple[dict[str, Tensor], dict[str, Signals]]:
        """Media tokens by modality, in the order of the prompt; absent media are absent.

        Each (levels, n, hidden): the tokens, and for pictures of Qwen3-Omni what deepstack adds to them. And what a
        method `needs` of clips and sounds.
        """
        media = inputs.media(self.config.audio.alone_from)
        return collected((medium.kind, self.encode_medium(medium, needs, call=call)) for medium in media)

    def encode_medium(
        self, medium: Medium, needs: Needs | None = None, *, call: Call = directly
    ) -> tuple[Tensor, Signals | None]:
        """(levels, n, hidden) tokens of one medium, and what a method `needs` of them. Others beside change nothing."""
        if medium.kind == "audio":
            tokens, signals = self.audio(medium.data, medium.size, needs, call=call)
            return tokens.unsqueeze(0), signals
        return self.vision(medium.data, medium.size, needs if medium.kind == "video" else None, call=call)

    def embed(self, ids: Tensor, source: Tensor, media: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings of ids, or in their place what the encoders made, (B, S, hidden).

        ids: (B, S). media: (1 + deepstack levels, B, n, hidden) or None. source: (B, S) which of them, -1 for the id.
        And, where there are pictures and the family has it, deepstack: (levels, B, S, hidden), zero elsewhere.
        """
        x = self.embedding(ids)
        if media is None:
            return x, None
        is_media, source = (source >= 0)[..., None], source.clamp(min=0)
        index = source[..., None].expand(-1, -1, x.shape[-1])
        x = torch.where(is_media, media[0].gather(1, index), x)
        if len(media) == 1:
            return x, None
        return x, torch.stack([torch.where(is_media, level.gather(1, index), 0) for level in media[1:]])

    @part
    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (3, B, S) → the decoder's cos and sin, (B, 1, S, head_dim / 2), the same for every head."""
        decoder = self.config.decoder
        sections, interleaved = decoder.mrope_section, decoder.mrope_interleaved
        cos, sin = multimodal_rotary(positions, decoder.head_dim, decoder.rope_theta, sections, interleaved=interleaved)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def decode(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One decoding step: (B,) token ids at (B,) positions → (B, vocab) float32 logits of the next."""
        x = self.embedding(tokens[:, None])
        rotary = self.rotary(positions.expand(3, -1).unsqueeze(-1))
        keys, values = [], []
        for layer, *stored in zip(self.layers, cache.keys, cache.values, cache.written(), strict=True):
            x, key, value = cast(Layer, layer).decode(x, rotary, *stored)
            keys.append(key)
            values.append(value)
        cache.append(keys, values)
        return self.logits(x[:, -1])

    @part
    def logits(self, x: Tensor) -> Tensor:
        """(B, hidden) of the last layer → (B, vocab) float32."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return float32_linear(self.norm(x), weight)


def collected(
    encoded: Iterable[tuple[str, tuple[Tensor, Signals | None]]],
) -> tuple[dict[str, Tensor], dict[str, Signals]]:
    """What `Thinker.encode` returns, of media one by one with their kind."""
    features: dict[str, list[Tensor]] = {}
    signals: dict[str, list[Signals | None]] = {}
    for kind, (tokens, signal) in encoded:
        features.setdefault(kind, []).append(tokens)
        signals.setdefault(kind, []).append(signal)
    known = {kind: joined(some) for kind, some in signals.items()}
    return (
        # One medium, which may be an hour long, is not copied.
        {kind: some[0] if len(some) == 1 else torch.cat(some, dim=1) for kind, some in features.items()},
        {kind: signal for kind, signal in known.items() if signal is not None},
    )
