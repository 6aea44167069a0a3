"""Omni: a loaded checkpoint that prepares requests, prefills and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

import weights
from omni.cache import Cache
from omni.config import QWEN3, OmniConfig, read_config
from omni.inputs import InputError, Inputs
from omni.processing.positions import Layout, layout
from omni.processing.processor import Processor
from omni.processing.reasoning import AnswerStream, split_answer
from omni.processing.tokenizer import Tokenizer
from omni.runtime.sampling import Sampling, pick
from omni.stages import fill_pool, read_prompt, whole_prompt
from omni.stages import prefill as run_stages
from omni.thinker import Thinker
from seats.config import SeatsConfig
from seats.cost import prefill_macs
from seats.plan import make_plan, plan_without_selection

KV = ("pruned", "layerwise")


class GenerateOptions(TypedDict, total=False):
    """max_new_tokens: 512 unless given. temperature, top_p, top_k: `omni.runtime.sampling.Sampling`; greedy
    unless given. seed: makes sampling repeatable on one device. stop_token_ids: instead of the checkpoint's own.
    seats, kv: token selection, as `Omni.prefill` takes it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stop_token_ids: list[int] | None
    seats: SeatsConfig | None
    kv: str


@dataclass(frozen=True)
class Stats:
    """Figures of one answer. Seconds are wall-clock; `prefill_seconds` ends with the first token.

    segments: tokens that runs of decoder layers saw, from the first layer to the last; one where every token is kept.
    macs, full_macs: multiply-accumulates of this prefill, and of one with every token.
    """

    tokens: dict[str, int]
    segments: list[int]
    macs: int
    full_macs: int
    cache_bytes: int
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int

    @property
    def macs_ratio(self) -> float:
        """How many times fewer multiply-accumulates than with every token."""
        return self.full_macs / self.macs

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


@dataclass
class Prefill:
    """A prompt that went through the decoder. logits: (vocab,) float32 of the next token.

    kept: the surviving original positions after each selection step, in order; empty where every token is
    kept. cache and next_position are what decoding continues from.
    """

    logits: Tensor
    kept: list[Tensor]
    cache: Cache = field(repr=False)
    next_position: float
    tokens: dict[str, int]
    segments: list[int]
    macs: int
    full_macs: int
    encode_seconds: float
    prefill_seconds: float


@dataclass
class Generation:
    """An answer. tokens: ids, the stop token included; text: without control tokens.

    thought: what a reasoning checkpoint wrote between its marks, which `text` leaves out; "" where there is none.
    """

    tokens: list[int]
    stats: Stats
    _prompt: Tensor = field(repr=False)
    _tokenizer: Callable[[], Tokenizer] = field(repr=False)

    @property
    def text(self) -> str:
        return self._parts[1]

    @property
    def thought(self) -> str:
        return self._parts[0]

    @cached_property
    def _parts(self) -> tuple[str, str]:
        return split_answer(self._tokenizer(), self._prompt[0].tolist(), self.tokens)


class Omni:
    """One checkpoint in memory. Made by `omni.load`."""

    def __init__(self, thinker: Thinker, folder: Path) -> None:
        self.thinker = thinker
        self.config: OmniConfig = thinker.config
        self.folder = folder

    @property
    def device(self) -> torch.device:
        return self.thinker.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.thinker.embedding.weight.dtype

    @cached_property
    def processor(self) -> Processor:
        """Tokenizer, chat template and media rules: read from the checkpoint when text is first asked for."""
        return Processor(self.folder, self.config)

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        use_audio_in_video: bool = True,
        fps: float = 2.0,
        max_frames: int = 768,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        on_frame: Callable[[int, int], None] | None = None,
    ) -> Inputs:
        """Messages in the chat format, with media parts, → the tensors of one request, on the CPU.

        What the options mean and what is raised: `omni.processing.processor.Processor.prepare`.
        """
        return self.processor.prepare(
            messages,
            use_audio_in_video=use_audio_in_video,
            fps=fps,
            max_frames=max_frames,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            on_frame=on_frame,
        )

    @torch.inference_mode()
    def prefill(self, inputs: Inputs, seats: SeatsConfig | None = None, kv: str = "pruned") -> Prefill:
        """Runs the prompt, with token selection where `seats` asks for it and there is video or sound to select from.

        kv: "pruned" cuts every layer's cache to the tokens that are left at the end, "layerwise" leaves each layer
        what it attended to. Raises InputError where the prompt does not fit the model or its placeholders its media,
        ValueError for settings that this model cannot follow.
        """
        return self._prefill(inputs, 0, seats, kv)

    def generate(self, inputs: Inputs, **options: Unpack[GenerateOptions]) -> Generation:
        """Answers a request. Needs no tokenizer where `stop_token_ids` are given. Errors: `stream`."""
        tokens = self._tokens(inputs, **options)
        while True:
            try:
                next(tokens)
            except StopIteration as stop:
                return stop.value

    def stream(
        self,
        inputs: Inputs,
        *,
        on_thought: Callable[[str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[str, None, Generation]:
        """Yields the answer's text as it comes, in whole characters; the generator's value is the Generation.

        on_thought: called with the pieces of a reasoning checkpoint's thought, which are not part of the text.
        Raises InputError before any work where prompt and answer exceed the context, ValueError for options
        out of range.
        """
        answer = AnswerStream(self.processor.tokenizer, inputs.input_ids[0].tolist())
        tokens = self._tokens(inputs, **options)
        generation = None
        while generation is None:
            try:
                piece = answer.push(next(tokens))
            except StopIteration as stop:
                generation, piece = stop.value, answer.flush()
            if piece.text and not piece.is_thought:
                yield piece.text
            elif piece.text and on_thought is not None:
                on_thought(piece.text)
        return generation

    def _tokens(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop_token_ids: list[int] | None = None,
        seats: SeatsConfig | None = None,
        kv: str = "pruned",
    ) -> Generator[int, None, Generation]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {seed}.")
        sampling = Sampling(temperature, top_p, top_k)
        stops = frozenset(self._stop_token_ids() if stop_token_ids is None else stop_token_ids)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

        with torch.inference_mode():
            started = time.perf_counter()
            prefill = self._prefill(inputs, max_new_tokens, seats, kv)
            token = pick(prefill.logits[None], sampling, generator)
        tokens = [int(token)]
        first = time.perf_counter()
        yield tokens[-1]
        while tokens[-1] not in stops and len(tokens) < max_new_tokens:
            with torch.inference_mode():
                position = torch.full((1,), prefill.next_position + len(tokens) - 1, device=self.device)
                logits = self.thinker.decode(token, position, prefill.cache)
                token = pick(logits, sampling, generator)
            tokens.append(int(token))
            yield tokens[-1]
        stats = Stats(
            tokens=prefill.tokens,
            segments=prefill.segments,
            macs=prefill.macs,
            full_macs=prefill.full_macs,
            cache_bytes=prefill.cache.nbytes,
            encode_seconds=prefill.encode_seconds,
            prefill_seconds=first - started - prefill.encode_seconds,
            decode_seconds=time.perf_counter() - first,
            new_tokens=len(tokens),
        )
        return Generation(tokens, stats, inputs.input_ids, lambda: self.processor.tokenizer)

    def _prefill(self, inputs: Inputs, max_new_tokens: int, seats: SeatsConfig | None, kv: str) -> Prefill:
        if kv not in KV:
            raise ValueError(f"kv must be one of {', '.join(KV)}, not {kv!r}.")
        places = layout(inputs, self.config)
        self._check_context(places, max_new_tokens)
        num_layers = self.config.decoder.num_layers
        selects = False
        if seats is not None:
            seats.check(num_layers)
            selects = not seats.keeps_everything and bool(len(places.video) or len(places.audio))
        if seats is not None and selects:
            prompt = read_prompt(places, inputs, self.config)
            plan = make_plan(seats, num_layers, prompt.counts(seats.encoder_ratios))
        else:
            prompt = whole_prompt(places.positions.shape[1])
            plan = plan_without_selection(num_layers, prompt.counts((1.0, 1.0)))
        started = time.perf_counter()
        features, received = self.thinker.encode(inputs, weigh=selects)
        self._synchronize()
        encoded = time.perf_counter()
        x, deepstack = self.thinker.embed(inputs, places, features)
        del features  # of an hour of video: gigabytes
        request = fill_pool(plan, prompt, places.positions, x, deepstack, received)
        del x, deepstack
        staged = run_stages(self.thinker, plan, request, pruned=kv == "pruned")
        # The one read of what was selected, when all work is under way.
        kept = [place[0, : int(count[0])].cpu() for place, count in staged.kept]
        cache = Cache.of_prefill(staged.keys, staged.values, staged.lengths, max_new_tokens)
        ends = [segment.layers[1] for segment in plan.segments[:-1]]
        self._synchronize()
        segments = [len(places_kept) for places_kept in kept]
        drops = [(end - 1, tokens) for end, tokens in zip(ends, segments[1:], strict=True)]
        return Prefill(
            logits=staged.logits[0],
            kept=kept if selects else [],
            cache=cache,
            next_position=places.next_position,
            tokens=places.counts,
            segments=segments,
            macs=self._macs(segments[0], drops),
            full_macs=self._macs(places.positions.shape[1], []),
            encode_seconds=encoded - started,
            prefill_seconds=time.perf_counter() - encoded,
        )

    def _macs(self, tokens: int, drops: list[tuple[int, int]]) -> int:
        decoder = self.config.decoder
        return prefill_macs(
            tokens,
            drops,
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            # Where a few layers of many are dense, the count takes them for sparse ones.
            intermediate_size=decoder.experts_per_token * decoder.expert_size or decoder.intermediate_size,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            vocab_size=decoder.vocab_size,
            head_dim=decoder.head_dim,
        )

    def _check_context(self, places: Layout, max_new_tokens: int) -> None:
        limit = self.config.decoder.max_position_embeddings
        length = places.positions.shape[1]
        if length + max_new_tokens > limit:
            counts = ", ".join(f"{count} {name}" for name, count in places.counts.items() if count)
            raise InputError(
                f"the prompt has {length} tokens ({counts}) and the answer may take {max_new_tokens}, together more "
                f"than the model's {limit}: lower fps, max_frames, max_pixels or max_new_tokens, or cut the clip."
            )

    def _stop_token_ids(self) -> tuple[int, ...]:
        return self.config.stop_token_ids or self.processor.stop_token_ids

    def _synchronize(self) -> None:
        """So that seconds are those of the work, not of its launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Omni:
    """Loads a public checkpoint.

    source: a hub id (`Qwen/Qwen2.5-Omni-7B`, with `revision`) or a folder in the public layout.
    device: the accelerator where there is one, else the CPU. dtype: the checkpoint's own, but float32 on a CPU,
    where most processors have no bfloat16 product. progress: bars on stderr.
    Raises omni.config.ConfigError and weights.CheckpointError.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = weights.locate(source, revision=revision)
    config = read_config(folder)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else config.dtype
    with torch.device("meta"):
        thinker = Thinker(config)
    weights.fill(thinker, folder, tensor_names(config), device=device, dtype=dtype, progress=progress)
    return Omni(thinker.eval().requires_grad_(False), folder)


def tensor_names(config: OmniConfig) -> dict[str, weights.Destination]:
    """The public tensor names of a checkpoint with these sizes, and the parameters they fill."""
    vision, audio, decoder = config.vision, config.audio, config.decoder
    if config.family == QWEN3:
        return weights.qwen3_omni_moe(
            vision_depth=vision.depth,
            deepstack_levels=len(vision.deepstack_blocks),
            audio_layers=audio.num_layers,
            sparse_layers=[decoder.is_sparse(index) for index in range(decoder.num_layers)],
            query_rows=decoder.num_heads * decoder.head_dim,
            key_rows=decoder.num_kv_heads * decoder.head_dim,
            dense_intermediate=decoder.intermediate_size,
            num_experts=decoder.num_experts,
            expert_intermediate=decoder.expert_size,
            tied_head=decoder.tie_word_embeddings,
        )
    return weights.qwen2_5_omni(
        vision_depth=vision.depth,
        vision_size=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        audio_layers=audio.num_layers,
        decoder_layers=decoder.num_layers,
        query_rows=decoder.num_heads * decoder.head_dim,
        key_rows=decoder.num_kv_heads * decoder.head_dim,
        decoder_intermediate=decoder.intermediate_size,
        tied_head=decoder.tie_word_embeddings,
    )
