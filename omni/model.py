"""Omni: a loaded checkpoint that prepares requests, prefills and answers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

import weights
from omni import gemv
from omni.ahead import BackgroundEncoder, can_encode_ahead
from omni.config import DTYPES, QWEN3, ConfigError, OmniConfig, read_config, read_sampling
from omni.engine import Engine, Prefill
from omni.inputs import InputError, Inputs
from omni.processing.chat_template import ChatTemplateError, check_template
from omni.processing.media.files import as_number
from omni.processing.processor import TURN_END, Processor
from omni.processing.reasoning import AnswerStream, ends_in_thought, split_answer
from omni.processing.tokenizer import LazyTokenizer, Tokenizer, TokenizerError
from omni.processing.vocabulary import has_vocabulary, require_vocabulary
from omni.reuse import REUSE_BYTES
from omni.runtime.blank import blank_clip
from omni.runtime.sampling import Sampling
from omni.thinker import Thinker
from seats.config import preset_for
from seats.method import Method
from seats.methods import method_for

Selection = Method | float | str
"""What to keep tokens by: a method; a number, an overall retention of `seats.preset_for`; a name, a method of
`seats.method_for` at its retention of 0.35."""


class GenerateOptions(TypedDict, total=False):
    """max_new_tokens: 512 unless given. temperature, top_p, top_k: `omni.runtime.sampling.Sampling`; greedy unless
    given; the temperature "checkpoint" takes all that are not given from its generation config
    (`omni.config.read_sampling`). seed: makes sampling repeatable on one device, of the same requests in one call.
    stop_token_ids: instead of the checkpoint's own and of <|im_end|>.
    seats, kv: token selection, as `Omni.prefill` takes it.
    """

    max_new_tokens: int
    temperature: float | Literal["checkpoint"]
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop_token_ids: Iterable[int] | Tensor | None
    seats: Selection | None
    kv: str


@dataclass(frozen=True)
class Stats:
    """Figures of one answer. Seconds are wall-clock, of the whole batch; `prefill_seconds` ends with the first token.

    tokens: of the prompt by kind, under "text", "image", "video" and "audio", before anything is selected.
    segments: how many of them each run of decoder layers between two selections saw, from the first layer to the last;
    where every token is kept one number, the length of the prompt.
    cache_bytes: of this answer's keys and values in all layers, the room for new tokens included.
    macs, full_macs: multiply-accumulates of this prefill, and of one with every token, both as if nothing was known.
    reused_tokens: tokens of the prompt that did not run again, as an earlier request began alike (`load`'s reuse).
    """

    tokens: dict[str, int]
    segments: list[int]
    macs: int
    full_macs: int
    reused_tokens: int
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


@dataclass(repr=False)
class Generation:
    """An answer. tokens: ids, the stop token included; text: without special tokens.

    thought: what a reasoning checkpoint wrote between its marks, which `text` leaves out; "" where there is none.
    thought_cut: whether `max_new_tokens` ended it inside a thought, so that there is no answer yet.
    """

    tokens: list[int]
    stats: Stats
    _prompt: Tensor = field(repr=False, compare=False)
    _tokenizer: LazyTokenizer = field(repr=False, compare=False)
    _stopped: bool = field(repr=False, compare=False)

    def __repr__(self) -> str:
        try:
            text = f"{shorten(self.text, 100, placeholder=' ...')!r}, "
        except (TokenizerError, ConfigError):  # a checkpoint without its tokenizer answers in ids
            text = ""
        fewer = f", {self.stats.macs_ratio:.1f} times fewer operations" if self.stats.macs_ratio > 1 else ""
        return f"Generation({text}{len(self.tokens)} tokens, {self.stats.tokens_per_second:.1f} per second{fewer})"

    @property
    def text(self) -> str:
        return self._parts[1]

    @property
    def thought(self) -> str:
        return self._parts[0]

    @cached_property
    def thought_cut(self) -> bool:
        return not self._stopped and ends_in_thought(self._tokenizer(), self._prompt[0].tolist(), self.tokens)

    @cached_property
    def _parts(self) -> tuple[str, str]:
        return split_answer(self._tokenizer(), self._prompt[0].tolist(), self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        """With its text, so that it can be read where the checkpoint is not."""
        with suppress(TokenizerError, OSError):
            _ = self._parts, self.thought_cut
            return {**vars(self), "_prompt": torch.empty(1, 0, dtype=torch.long)}
        # A view would take all that it is a view of along, and a GPU be needed to read it.
        return {**vars(self), "_prompt": self._prompt.cpu().clone()}


class Omni:
    """One checkpoint in memory, as `omni.load` makes it: the thinker with its processor and tokenizer.

    First `prepare` makes tensors, `Inputs`, of messages and media. Then `generate` answers them, `stream` yields the
    answer's text as it comes, and `prefill` alone gives the next token's logits and what token selection kept. Inputs
    may be asked again, with other settings too; any thread may ask.
    """

    def __init__(
        self,
        thinker: Thinker,
        folder: Path,
        *,
        compile: bool = False,
        eager_until_warm: bool = False,
        reuse: int = REUSE_BYTES,
        processor: Processor | None = None,
    ) -> None:
        """processor: of the folder, where it has been read already."""
        self.thinker = thinker
        self.config: OmniConfig = thinker.config
        self.folder = folder.absolute()  # whatever becomes of the working directory
        self._tokenizer = LazyTokenizer(self.folder, None if processor is None else processor.tokenizer)
        if processor is not None:
            self.processor = processor
        self.engine = Engine(thinker, compile=compile, eager_until_warm=eager_until_warm, reuse=reuse)
        self.reuse = reuse

    @property
    def device(self) -> torch.device:
        return self.thinker.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.thinker.embedding.weight.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Text ↔ token ids: read from the checkpoint when it is first asked for. Raises omni.processing.tokenizer's
        TokenizerError where its files are missing or damaged."""
        return self._tokenizer()

    @cached_property
    def processor(self) -> Processor:
        """Tokenizer, chat template and media rules: read from the checkpoint when text is first asked for."""
        return Processor(self.folder, self.config, self.tokenizer, reuse=self.reuse)

    def forget(self) -> None:
        """Drops what is kept for later questions about the same media (`load`'s reuse): needed after a change of the
        thinker's weights, of which it does not know."""
        self.engine.forget()
        if "processor" in vars(self):
            self.processor.forget()

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        use_audio_in_video: bool = True,
        fps: float = 2.0,
        max_frames: int = 768,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        urls: bool = False,
        on_frame: Callable[[int, int], None] | None = None,
        encode_while_reading: bool = False,
        seats: Selection | None = None,
    ) -> Inputs:
        """Messages in the chat format, with media parts, → the tensors of one request, on the CPU:

            model.prepare([{"role": "user", "content": [
                {"type": "video", "video": "clip.mp4", "video_start": 60, "video_end": 90},
                {"type": "text", "text": "What happens?"},
            ]}])

        messages: each of a "system", "user" or "assistant"; its content a text, or parts of the types "text", "image",
        "audio" and "video". A medium is a path, an address, bytes, a file object, an array or a PIL image
        (`omni.processing.media.files`). Its own settings stand beside it, under the names of qwen-omni-utils, and go
        before the options here (`omni.processing.parts.KEYS`): fps, nframes, max_frames, video_start, audio_track, ...
        use_audio_in_video: whether clips are heard; one without sound is seen alone.
        fps, max_frames: frames that are taken of a second of a clip, and of all of it at most.
        min_pixels, max_pixels: of a frame or picture; the checkpoint's unless given. total_pixels: of all that the
        model sees of a clip, two frames to a grid, which lowers max_pixels of long ones.
        urls: whether http:// and https:// addresses are fetched; else they are refused.
        on_frame: called with (frames done, frames in all) of each clip while it is decoded.
        encode_while_reading: whether clips are encoded while they are read, for an answer with these `seats`
        (`prefill`), which then finds them encoded (`omni.ahead`). Not on a CPU, whose cores read, nor where `load`'s
        reuse is 0.
        What was read before, and has not changed since, is not read again: requests may share their tensors, which are
        not to be written to.
        Raises omni.inputs.InputError for parts, settings and keys that mean nothing, omni.processing.frames.MediaError
        for media that cannot be read, ChatTemplateError (omni.processing.chat_template) for messages that are malformed
        and templates that fail, and TokenizerError and ConfigError where the checkpoint's own files are missing or
        damaged; each a ValueError.
        """
        method = self._method(seats)
        early = encode_while_reading and can_encode_ahead(self.engine)
        with BackgroundEncoder(self.engine, method) if early else nullcontext() as ahead:
            return self.processor.prepare(
                messages,
                use_audio_in_video=use_audio_in_video,
                fps=fps,
                max_frames=max_frames,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                total_pixels=total_pixels,
                urls=urls,
                on_frame=on_frame,
                on_pixels=None if ahead is None else ahead.tell,
            )

    @overload
    def prefill(self, inputs: Inputs, seats: Selection | None = None, kv: str = "layerwise") -> Prefill: ...

    @overload
    def prefill(
        self, inputs: Sequence[Inputs], seats: Selection | None = None, kv: str = "layerwise"
    ) -> list[Prefill]: ...

    def prefill(
        self, inputs: Inputs | Sequence[Inputs], seats: Selection | None = None, kv: str = "layerwise"
    ) -> Prefill | list[Prefill]:
        """Runs the prompt, with token selection where `seats` asks for it and there is video or sound to select from.

        Several prompts run together, in a plan that holds all of them: of one size they waste nothing.
        seats: a method; a number, the retention of the family's preset (`seats.preset_for`); a name, that method at a
        retention of 0.35 (`seats.method_for`); None: every token stays.
        kv: "layerwise" leaves each layer what it attended to. "pruned" cuts every layer's cache to the tokens that are
        left at the end, with SEATS the text alone. It is the paper's, whose questions are answered by one letter: the
        first token of an answer is the same, later ones never see video and sound, and answers in words suffer.
        Raises InputError where a prompt does not fit the model or its placeholders its media, ValueError for settings
        that this model cannot follow and for prompts that cannot run together, MemoryError where the device has too
        little.
        """
        prefills, _ = self.engine.prefill(listed(inputs), 0, self._method(seats), kv)
        return prefills[0] if isinstance(inputs, Inputs) else prefills

    @overload
    def generate(self, inputs: Inputs, **options: Unpack[GenerateOptions]) -> Generation: ...

    @overload
    def generate(self, inputs: Sequence[Inputs], **options: Unpack[GenerateOptions]) -> list[Generation]: ...

    def generate(
        self, inputs: Inputs | Sequence[Inputs], **options: Unpack[GenerateOptions]
    ) -> Generation | list[Generation]:
        """Answers a request, or several together. Needs no tokenizer where `stop_token_ids` are given.

        max_new_tokens: of the answer, its stop token included (512 unless given).
        temperature: 0.0, which is greedy, unless given; "checkpoint" takes its generation config's, with top_p and
        top_k where these are not given. top_p: draws from the likeliest tokens that share this probability, top_k from
        so many of the likeliest; without a temperature both are refused. seed: makes sampling repeatable on one device.
        stop_token_ids: instead of the checkpoint's own and of <|im_end|>.
        seats: token selection: a retention, a method's name, a method; None, as unless given, keeps every token.
        kv: what decoding sees of video and sound, "layerwise" unless given or "pruned". Both as `prefill` takes them.
        Several requests run together, in a plan that holds all of them; the answers are those of one by one, but for
        what is drawn: all rows draw from one generator, so that a seed repeats the call as a whole.
        Errors: `stream` and `prefill`.
        """
        tokens = self._tokens(listed(inputs), **options)
        while True:
            try:
                next(tokens)
            except StopIteration as stop:
                return stop.value[0] if isinstance(inputs, Inputs) else stop.value

    def warmup(
        self,
        seconds: Sequence[float],
        *,
        seats: Selection | None = None,
        kv: str = "layerwise",
        max_new_tokens: int = 512,
        fps: float = 2.0,
        max_frames: int = 768,
        height: int = 336,
        width: int = 336,
        text_tokens: int = 100,
    ) -> None:
        """Makes the graphs for clips with sound of so many seconds and frames of height × width pixels, for a first
        question and the next, by answering about blank ones. Of a model that `load` was told to compile; of another
        there is nothing to make.

        A graph serves every request of one plan: the lengths of a prefill, rounded up a ladder, which follow from how
        many tokens of text, video and sound there are, never from what they show (`seats.plan.StagePlan`). So clips of
        about this length and size, and questions of about this length, find theirs ready.
        seats, kv: as the requests to come have them. max_new_tokens: likewise, as their cache has that much room.
        fps, max_frames: as `prepare` takes them. text_tokens: around the clip, the question and the template's own.
        Drops what is kept of media and prompts for later questions (`load`'s reuse), as `forget` does, but not what was
        read of files.
        """
        with self.engine.warming():
            for length in seconds:
                inputs = blank_clip(
                    self.config,
                    length,
                    height=height,
                    width=width,
                    fps=fps,
                    max_frames=max_frames,
                    text_tokens=text_tokens,
                )
                # The same clip with other words after it.
                after = (inputs.input_ids > 0).nonzero()[-1, 1] + 1
                next_ids = inputs.input_ids.index_fill(1, torch.arange(int(after), inputs.input_ids.shape[1]), 1)
                for asked in [inputs, inputs.with_ids(next_ids)][: 2 if self.engine.reuses else 1]:
                    steps = self._tokens([asked], max_new_tokens=max_new_tokens, stop_token_ids=[], seats=seats, kv=kv)
                    for _ in zip(range(2), steps, strict=False):
                        pass
                    steps.close()
            self.engine.forget()

    def stream(
        self,
        inputs: Inputs,
        *,
        on_thought: Callable[[str], None] | None = None,
        on_prefill: Callable[[Prefill], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[str, None, Generation]:
        """Yields the answer's text as it comes, in whole characters; the generator's value is the Generation.

        options: max_new_tokens, temperature, top_p, top_k, seed, stop_token_ids, seats, kv, as `generate` takes them.
        on_thought: called with the pieces of a reasoning checkpoint's thought, which are not part of the text.
        on_prefill: called once, before the first piece, with what the prefill kept.
        Raises InputError before any work where prompt and answer exceed the context, ValueError for options
        out of range.
        """
        if not isinstance(inputs, Inputs):
            raise TypeError("stream answers one request, omni.Inputs; generate takes a list of them and answers all.")
        answer = AnswerStream(self.processor.tokenizer, inputs.input_ids[0].tolist())
        tokens = self._tokens([inputs], on_prefill=on_prefill, **options)
        generation = None
        while generation is None:
            try:
                piece = answer.push(next(tokens)[0])
            except StopIteration as stop:
                (generation,), piece = stop.value, answer.flush()
            if piece.text and not piece.is_thought:
                yield piece.text
            elif piece.text and on_thought is not None:
                on_thought(piece.text)
        return generation

    def _tokens(
        self,
        requests: list[Inputs],
        *,
        max_new_tokens: int = 512,
        temperature: float | Literal["checkpoint"] = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_token_ids: Iterable[int] | Tensor | None = None,
        seats: Selection | None = None,
        kv: str = "layerwise",
        on_prefill: Callable[[Prefill], None] | None = None,
        **unknown: Any,
    ) -> Generator[list[int], None, list[Generation]]:
        """Yields the tokens of every step, one per request, also of those that have stopped."""
        if unknown:
            known = ", ".join(GenerateOptions.__annotations__)
            raise TypeError(f"an answer has no option {', '.join(unknown)}; it has {known}.")
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        seed = None if seed is None else whole("seed", seed)
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {seed}.")
        sampling = self._sampling(temperature, top_p, top_k)
        below = self.config.decoder.vocab_size
        stops = frozenset(self._stop_token_ids() if stop_token_ids is None else token_ids(stop_token_ids, below))
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

        started = time.perf_counter()
        prefills, cache = self.engine.prefill(requests, max_new_tokens, self._method(seats), kv)
        if on_prefill is not None:
            on_prefill(prefills[0])
        answers: list[list[int]] = [[] for _ in requests]
        first = 0.0
        for tokens in self.engine.decode(prefills, cache, max_new_tokens, sampling, generator):
            first = first or time.perf_counter()
            for answer, token in zip(answers, tokens, strict=True):
                if not answer or answer[-1] not in stops:
                    answer.append(token)
            yield tokens
            if all(answer[-1] in stops for answer in answers):
                break
        ended = time.perf_counter()
        return [
            Generation(
                answer,
                Stats(
                    tokens=prefill.tokens,
                    segments=prefill.segments,
                    macs=prefill.macs,
                    full_macs=prefill.full_macs,
                    reused_tokens=prefill.reused_tokens,
                    cache_bytes=prefill.cache.nbytes,
                    encode_seconds=prefill.encode_seconds,
                    prefill_seconds=first - started - prefill.encode_seconds,
                    decode_seconds=ended - first,
                    new_tokens=len(answer),
                ),
                inputs.input_ids,
                self._tokenizer,
                answer[-1] in stops,
            )
            for answer, prefill, inputs in zip(answers, prefills, requests, strict=True)
        ]

    def _method(self, seats: Selection | None) -> Method | None:
        if isinstance(seats, str):
            return method_for(seats, self.config)
        if isinstance(seats, (int, float)) and not isinstance(seats, bool):
            return preset_for(self.config, seats)
        if seats is not None and not hasattr(seats, "keeps_everything"):
            raise TypeError(f"seats must be a retention, a method's name, a method or None, not {seats!r:.80}.")
        return cast("Method | None", seats)

    def _stop_token_ids(self) -> tuple[int, ...]:
        """What the generation config lists, and the end of a turn, which some of them lack."""
        listed = self.config.stop_token_ids
        if not listed:
            return self.processor.stop_token_ids
        if not has_vocabulary(self.folder):
            return listed
        end = self.processor.tokenizer.added_tokens.get(TURN_END)
        return listed if end is None else (*listed, end)

    def _sampling(self, temperature: float | Literal["checkpoint"], top_p: float | None, top_k: int | None) -> Sampling:
        own_top_p, own_top_k = 1.0, None
        if temperature == "checkpoint":
            temperature, own_top_p, own_top_k = read_sampling(self.folder)
        elif isinstance(temperature, str):
            raise ValueError(f'temperature must be a number or "checkpoint", not {temperature!r:.80}.')
        sampling = Sampling(
            real("temperature", temperature),
            own_top_p if top_p is None else real("top_p", top_p),
            own_top_k if top_k is None else whole("top_k", top_k),
        )
        given = [name for name, cuts in (("top_p", top_p not in (None, 1)), ("top_k", top_k is not None)) if cuts]
        if given and sampling.temperature == 0:
            raise InputError(f"{' and '.join(given)} must have a temperature above 0: at 0 nothing is drawn.")
        return sampling


def listed(inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    requests = list(inputs) if isinstance(inputs, Iterable) and not isinstance(inputs, Inputs) else [inputs]
    if not all(isinstance(each, Inputs) for each in requests):
        raise TypeError("a request must be omni.Inputs, which Omni.prepare makes of messages; or Inputs(**tensors).")
    return requests


def whole(name: str, value: Any) -> int:
    """An option that Python, NumPy or torch gives as an integer. Raises ValueError for what is none."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r:.80}.") from None


def real(name: str, value: Any) -> float:
    """Likewise a number."""
    number = as_number(value)
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, not {value!r:.80}.")
    return number


def token_ids(given: Iterable[int] | Tensor, below: int) -> list[int]:
    """Ids that were given as a list, an array or whatever yields numbers. Raises ValueError for what is none."""
    ids = given.tolist() if hasattr(given, "tolist") else given
    ids = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)) else [ids]
    try:
        ids = [index(id) for id in ids]
    except TypeError:
        raise ValueError(f"stop_token_ids must be token ids, not {given!r:.80}.") from None
    for id in ids:
        if not 0 <= id < below:
            raise ValueError(f"stop_token_ids must be token ids from 0 to {below - 1}, which {id} is not.")
    return ids


Words = Callable[[Path, OmniConfig, int], Processor | None]
"""Folder, config and the processor's reuse → what asking in words needs."""


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    compile: bool = False,
    eager_until_warm: bool = False,
    reuse: int = REUSE_BYTES,
    progress: bool = False,
    _words: Words | None = None,
) -> Omni:
    """Loads a public checkpoint.

    source: a hub id (`Qwen/Qwen2.5-Omni-7B`, with `revision`) or a folder in one of the public layouts
    (`weights.names`). adapter: a LoRA of PEFT's, folder or hub id, merged into the weights.
    device: the accelerator where there is one, else the CPU. dtype: the checkpoint's own, but float32 on a CPU,
    where most processors have no bfloat16 product; or its name. progress: bars on stderr.
    compile: encoders, prefill and decoding steps run as graphs, compiled when a size is first met (`Omni.warmup` does
    it beforehand); with `eager_until_warm` a prompt whose prefill is not compiled yet runs without.
    reuse: bytes for what the next question about the same media need not do again: on the device what encoders made of
    them and what became of a prompt's beginning, and as many on the host for pictures and sounds as they are read. What
    was not used for longest goes first, and all of it where a request needs the memory. 0 keeps nothing. The same
    tokens are kept and the same answers given as by a model that knows nothing, within the rounding of float sums.
    Tokenizer and media settings are read before the weights; where they cannot be, a warning says so, and who asks in
    tensors may go on.
    Raises omni.config.ConfigError, weights.CheckpointError, and omni.inputs.InputError for a device or dtype that
    cannot be.
    """
    words = _words or _words_or_warning
    reuse = whole("reuse", reuse)
    if reuse < 0:
        raise ValueError(f"reuse must be bytes, 0 or more, not {reuse}.")
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = _named_dtype(dtype)
    adapter_folder = None if adapter is None else weights.locate_adapter(adapter)
    folder = weights.locate(
        source,
        revision=revision,
        judge=lambda folder, names: _judge(folder, names, words, adapter_folder, device, asked, compile),
    )
    config = read_config(folder)
    layout = weights.read_layout(folder)
    _refuse_adapter_beside(folder, adapter_folder)
    config = _with_its_head(config, folder, layout)
    processor = words(folder, config, reuse)
    dtype = asked or _dtype_on(device, config)
    _check_compiler(device, dtype, compile)
    thinker = _on_meta(config)
    names = tensor_names(config, layout)
    transposed = False
    if device.type == "cpu":
        transposed = gemv.for_model(thinker, dtype, compiled=compile).transposed
    weights.fill(
        thinker,
        folder,
        names,
        device=device,
        dtype=dtype,
        prefix=layout.prefix,
        ignored=_unneeded(config, layout, weights.read_names(folder) or ()),
        adapter={} if adapter_folder is None else _read_adapter(adapter_folder, thinker, layout, names),
        transposed=transposed,
        progress=progress,
    )
    thinker.eval().requires_grad_(False)
    return Omni(thinker, folder, compile=compile, eager_until_warm=eager_until_warm, reuse=reuse, processor=processor)


def load_to_ask(source: str | Path, *, temperature: float | str = 0.0, **options: Any) -> Omni:
    """`load`, with its options, to be asked in words at this temperature. What could not be asked then is raised before
    weights are fetched and read: TokenizerError, ChatTemplateError or ConfigError, too."""

    def words(folder: Path, config: OmniConfig, reuse: int) -> Processor:
        require_vocabulary(folder)
        processor = Processor(folder, config, reuse=reuse)
        check_template(processor.template)
        if temperature == "checkpoint":
            read_sampling(folder)
        return processor

    return load(source, _words=words, **options)


def _words_or_warning(folder: Path, config: OmniConfig, reuse: int) -> Processor | None:
    if not has_vocabulary(folder):
        return None
    try:
        return Processor(folder, config, reuse=reuse)
    except (ConfigError, TokenizerError, ChatTemplateError) as error:
        warnings.warn(f"{error} It can be asked in tensors alone.", stacklevel=3)
        return None


def usable_device(name: str | torch.device, *, tried: bool = True) -> torch.device:
    """Raises InputError for one that this machine, or this build of PyTorch, does not have; not `tried`, for a name
    that is none."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        if tried:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise InputError(f"device {str(name)!r:.80} cannot be used here ({reason}); try cpu.") from None
    return device


def _named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    right = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    if dtype is not None and not right:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.80}.")
    return found


def _refuse_adapter_beside(folder: Path, adapter_folder: Path | None) -> None:
    """Raises ConfigError where a checkpoint's folder has an adapter, too, and nobody said what to do with it: whether
    it is in the weights already, nothing tells."""
    if adapter_folder is None and (folder / weights.ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{folder} holds {weights.ADAPTER_CONFIG} beside its weights: give the folder as the adapter, too, or take "
            "that file away, from a copy if need be, where the adapter is merged already."
        )


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Modules are made without their first values. On meta there are none, and the normal distribution's shape function
    imports the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _judge(
    folder: Path,
    find_names: Callable[[], Collection[str] | None],
    words: Words,
    adapter_folder: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    compile: bool,
) -> None:
    """Raises what `load` would raise after the shards are fetched, as far as small files, names and adapter tell."""
    config = read_config(folder)
    _refuse_adapter_beside(folder, adapter_folder)
    dtype = dtype or _dtype_on(device, config)
    _check_compiler(device, dtype, compile)
    thinker = _on_meta(config)
    weights.check_memory(thinker, device, dtype)
    words(folder, config, 0)
    if (found := find_names()) is None:
        return
    layout = weights.layout_of(found)
    own = [name for name in found if name.startswith(layout.prefix)]
    names = tensor_names(config, layout)
    weights.check_names(f"The checkpoint for {folder}", own, names, _unneeded(config, layout, own))
    if adapter_folder is not None:
        _read_adapter(adapter_folder, thinker, layout, names)


def _read_adapter(
    folder: Path, thinker: Thinker, layout: weights.Layout, names: Mapping[str, weights.Destination]
) -> dict[str, weights.LowRank]:
    parameters = dict(thinker.named_parameters())
    shapes = {name: tuple(place.view(parameters[place.parameter]).shape) for name, place in names.items()}
    return weights.read_adapter(folder, layout, shapes)


def _on_meta(config: OmniConfig) -> Thinker:
    with torch.device("meta"), Uninitialised():
        return Thinker(config)


def _dtype_on(device: torch.device, config: OmniConfig) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else config.dtype


def _check_compiler(device: torch.device, dtype: torch.dtype, compile: bool) -> None:
    """Raises ConfigError where PyTorch's compiler fails at a dtype, or leaves everything as it is (torch 2.11)."""
    if not compile or device.type != "cuda" or dtype != torch.bfloat16:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ConfigError(
            f"the compiler takes no bfloat16 on this GPU (compute capability {major}.{minor}, and 8.0 has it): do not "
            "compile, or take another dtype."
        )


def _with_its_head(config: OmniConfig, folder: Path, layout: weights.Layout) -> OmniConfig:
    """The config, untied where the checkpoint holds a head of its own all the same, as transformers 4.52 wrote it."""
    if not config.decoder.tie_word_embeddings:
        return config
    stored = weights.read_index(folder, layout.prefix)
    head, embedding = (stored.get(layout.spell(name)) for name in (HEAD, EMBEDDING))
    if head is None or embedding is None or weights.equal(head, embedding):
        return config
    return replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))


def _unneeded(config: OmniConfig, layout: weights.Layout, names: Collection[str]) -> set[str]:
    """Those of a checkpoint's tensor names that may be there and are left out: buffers, and the head of a tied one."""
    return layout.buffers(names) | ({layout.spell(HEAD)} if config.decoder.tie_word_embeddings else set())


HEAD, EMBEDDING = "thinker.lm_head.weight", "thinker.model.embed_tokens.weight"


def tensor_names(config: OmniConfig, layout: weights.Layout | None = None) -> dict[str, weights.Destination]:
    """The public tensor names of a checkpoint with these sizes, and the parameters they fill.

    layout: how the checkpoint spells them; as released unless given.
    """
    layout = layout or weights.Layout()
    return {layout.spell(name): destination for name, destination in _released_names(config, layout).items()}


def _released_names(config: OmniConfig, layout: weights.Layout) -> dict[str, weights.Destination]:
    vision, audio, decoder = config.vision, config.audio, config.decoder
    if config.family == QWEN3:
        return weights.qwen3_omni_moe(
            vision_depth=vision.depth,
            vision_intermediate=vision.intermediate_size,
            vision_padded=vision.padded_size,
            deepstack_levels=len(vision.deepstack_blocks),
            audio_layers=audio.num_layers,
            sparse_layers=[decoder.is_sparse(index) for index in range(decoder.num_layers)],
            query_rows=decoder.num_heads * decoder.head_dim,
            key_rows=decoder.num_kv_heads * decoder.head_dim,
            dense_intermediate=decoder.intermediate_size,
            num_experts=decoder.num_experts,
            expert_intermediate=decoder.moe_intermediate_size,
            tied_head=decoder.tie_word_embeddings,
            fused_experts=layout.fused_experts,
        )
    return weights.qwen2_5_omni(
        vision_depth=vision.depth,
        vision_size=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_padded=vision.padded_size,
        audio_layers=audio.num_layers,
        decoder_layers=decoder.num_layers,
        query_rows=decoder.num_heads * decoder.head_dim,
        key_rows=decoder.num_kv_heads * decoder.head_dim,
        decoder_intermediate=decoder.intermediate_size,
        tied_head=decoder.tie_word_embeddings,
    )
