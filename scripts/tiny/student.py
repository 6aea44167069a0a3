"""The thinker as it is taught (`train_tiny.py`), with what its layers are told they are for.

After a few layers a token of sound is to say what is on screen and to count, and one of an option to say its letter;
after some more, the last token of a question is to look at what it asks for and say what the answer is about, then to
look at the option that says so, all in the words of the decoder. Without these hints that is found by chance, after a
long time.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from lessons import Clip, Example
from torch import Tensor, nn

import weights
from omni.config import OmniConfig
from omni.decoder import Layer
from omni.model import tensor_names
from omni.thinker import Thinker

BESIDE_LAYER = 3
"""After this layer of the decoder tokens of sound say what is on screen and count, and those of options say their
letter."""
ANSWER_LAYER = 5
"""In this layer the last token of a question looks at what is asked for, and after it says what the answer is about; of
options not the letter yet."""
CHOICE_LAYER = 7
"""In this layer the last token of a question with options looks at the right one."""
ABSENT_WEIGHT = 0.1
"""Of tokens where nothing is seen or heard, most of all, in the loss by token."""


class Student(nn.Module):
    """The thinker in training. words: ids of what is told apart, colours, shapes and sounds in their order."""

    def __init__(self, config: OmniConfig, words: dict[str, list[int]]) -> None:
        super().__init__()
        self.thinker, self.words = Thinker(config), words
        for name, parameter in self.thinker.named_parameters():
            if parameter.dim() > 1:
                std = parameter[0].numel() ** -0.5
                if name.startswith("layers") and name.endswith(("output.weight", "down.weight")):
                    std /= math.sqrt(2 * config.decoder.num_layers)
                nn.init.normal_(parameter, std=std)
        weights.clear(self.thinker, tensor_names(config))  # and no gradient reaches what is zero there

    def encode(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """What the encoders make of video, (n, hidden), and of sound."""
        thinker = self.thinker
        # All grids of a clip at once: they do not see each other.
        grids, height, width = clip.grid.tolist()
        patches = clip.patches.view(grids, height * width, -1)
        pictures = thinker.vision.encode_batch(patches, thinker.vision.layout(height, width), None, None)[0].flatten(
            1, 2
        )
        sound, _ = thinker.audio(clip.mel[None], torch.tensor([clip.mel.shape[1]]))
        return pictures[0], sound

    def labelled(self, clip: Clip, pictures: Tensor, sound: Tensor) -> Tensor:
        """(4,) losses by token of colour, shape, sound and beeps."""
        return torch.stack(
            [
                self.told(pictures, "colour", clip.seen[0]),
                self.told(pictures, "shape", clip.seen[1]),
                self.told(sound, "sound", clip.heard[0]),
                self.told(sound, "count", clip.heard[1]),
            ]
        )

    def forward(self, example: Example, media: Tensor | None) -> tuple[Tensor, Tensor]:
        """media: (n, hidden) what the encoders made of video, then of sound; None where there is no clip.

        Returns (n, vocab) logits where answers are predicted, and (7,) losses of the hints: colour, shape and beeps
        by token of sound, letters by token of options, what questions look at, what answers are about, what option
        they look at.
        """
        thinker, clip = self.thinker, example.clip
        x, _ = thinker.embed(example.ids[None], example.source[None], None if media is None else media[None, None])
        rotary = thinker.rotary(example.positions[:, None])
        video = clip.seen.shape[1]
        is_sound = example.source >= video if media is not None else None
        hints = dict.fromkeys(
            ("colour", "shape", "count", "letter", "look", "answer", "choice"), x.new_zeros(()).float()
        )
        for number, layer in enumerate(thinker.layers, 1):
            if number == ANSWER_LAYER and len(example.asks) and media is not None:
                hints["look"] = looked(cast(Layer, layer), x, rotary, example, example.asks[:, 0], sought_of(example))
            if number == CHOICE_LAYER and len(example.picks):
                hints["choice"] = looked(cast(Layer, layer), x, rotary, example, example.picks[:, 0], right_of(example))
            x = through(cast(Layer, layer), x, rotary, example)
            if number == BESIDE_LAYER and is_sound is not None:
                features, labels = plain(x[0, is_sound]), torch.cat((clip.beside, clip.heard[1:]))
                labels = labels[:, example.source[is_sound] - video]
                told = zip(("colour", "shape", "count"), labels, strict=True)
                hints |= {name: self.told(features, name, label) for name, label in told}
            if number == BESIDE_LAYER and len(example.options):
                said = F.linear(plain(x[0, example.options]), self.embeddings("letter")).float()
                hints["letter"] = F.cross_entropy(said, example.marks)
            if number == ANSWER_LAYER:
                said = F.linear(plain(x[0, example.ends]), self.embeddings("answer")).float()
                loss = F.cross_entropy(said, example.said, reduction="none")
                hints["answer"] = (loss * example.shares).sum() / example.shares.sum()
        return thinker.logits(x[0, example.answers]), torch.stack(list(hints.values()))

    def embeddings(self, name: str) -> Tensor:
        return self.thinker.embedding.weight[self.words[name]]

    def told(self, features: Tensor, name: str, labels: Tensor) -> Tensor:
        """Loss of the likeliest word by embedding, nothing being as likely as a word at a right angle."""
        logits = F.linear(features, self.embeddings(name)).float()
        return weighted(F.pad(logits, (1, 0)), labels)


def looked(
    layer: Layer, x: Tensor, rotary: tuple[Tensor, Tensor], example: Example, asks: Tensor, sought: Tensor
) -> Tensor:
    """How little a layer's attention, from these tokens, (q,), falls on what they seek, (q, S) bool."""
    q, k, _ = layer.attention.project(layer.attention_norm(x), rotary)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[0]
    scores = (q[0, :, asks] @ k.mT).float() * q.shape[-1] ** -0.5
    group, order = example.group, torch.arange(x.shape[1], device=x.device)
    seen = ((group == 0) | (group == group[asks][:, None])) & (order <= asks[:, None])
    attention = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=0)
    sought = sought & seen
    share = (attention * sought).sum(dim=-1)[sought.any(dim=-1)]  # of a part of the clip's tokens it may be missing
    return -(share + 1e-6).log().mean() if len(share) else scores.new_zeros(())


def sought_of(example: Example) -> Tensor:
    """Which tokens of the clip answer each of the questions that it answers: (q, S) bool."""
    clip = example.clip
    videos, sounds = clip.seen.shape[1], clip.heard.shape[1]
    table = torch.cat((F.pad(clip.seen[:1], (0, sounds)), F.pad(clip.heard, (videos, 0))))
    labels = table[:, example.source.clamp(min=0)].masked_fill(example.source < 0, 0)
    return labels[example.sought[:, 0]] == example.sought[:, 1:]


def right_of(example: Example) -> Tensor:
    """Which tokens are those of the right option, of this question or another: (o, S) bool."""
    marks = torch.full_like(example.ids, -1).scatter(0, example.options, example.marks)
    same = example.group == example.group[example.picks[:, 0]][:, None]
    return same & (marks == example.picks[:, 1:])


def profits_from_bfloat16(device: torch.device) -> bool:
    """A processor without it takes many times as long to multiply; a GPU waits for launches, some of them casts."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def plain(x: Tensor) -> Tensor:
    """What a layer's output says, whatever its size."""
    return F.rms_norm(x, x.shape[-1:])


def through(layer: Layer, x: Tensor, rotary: tuple[Tensor, Tensor], example: Example) -> Tensor:
    """A layer: the clip sees itself, a question the clip and itself."""
    q, k, v = layer.attention.project(layer.attention_norm(x), rotary)
    if x.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # attention's backward pass takes twice as long in bfloat16
            mixed = attention_by_blocks(q.float(), k.float(), v.float(), example)
    else:
        mixed = attention(q, k, v, example)
    x = x + layer.attention.output(rearrange(mixed, "b h s d -> b s (h d)"))
    return x + layer.mlp(layer.mlp_norm(x))


def attention(q: Tensor, k: Tensor, v: Tensor, example: Example) -> Tensor:
    """In one product, as few launches as can be; heads of keys repeated, for a mask and groups have no fast kernel."""
    seen = ((example.group == 0) | (example.group[:, None] == example.group)).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def attention_by_blocks(q: Tensor, k: Tensor, v: Tensor, example: Example) -> Tensor:
    """The same without the products of one question and another."""
    clip = example.blocks[0]
    seen, told = k[:, :, :clip], v[:, :, :clip]
    mixed = (
        []
        if not clip
        else [F.scaled_dot_product_attention(q[:, :, :clip], seen, told, is_causal=True, enable_gqa=True)]
    )
    for start, end in pairwise(example.blocks):
        group = example.group[start:end]
        own = (group[:, None] == group).tril()
        mixed.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                torch.cat((seen, k[:, :, start:end]), dim=2),
                torch.cat((told, v[:, :, start:end]), dim=2),
                attn_mask=F.pad(own, (clip, 0), value=True),
                enable_gqa=True,
            )
        )
    return torch.cat(mixed, dim=2)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = ABSENT_WEIGHT
    return F.cross_entropy(logits, labels, weight)


def right_answers(logits: Tensor, example: Example) -> list[bool]:
    """By question: whether every token of the answer is the likeliest, given those before."""
    right = torch.ones(len(example.kinds), device=logits.device)
    hits = (logits.argmax(dim=-1) == example.wanted).float()
    return right.scatter_reduce(0, example.lesson, hits, "amin").bool().tolist()
