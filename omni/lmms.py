"""The model `seats_omni` for lmms-eval (EvolvingLMMs-Lab/lmms-eval, 0.7), which finds it by its entry point.

    lmms-eval --model seats_omni --model_args pretrained=Qwen/Qwen2.5-Omni-7B,retention=0.1,max_frames=128 \
        --tasks worldsense --batch_size 4

With protocol=paper as arXiv 2605.20035 was measured (`omni.protocol`). Each sample of lmms-eval's log (--log_samples)
has, in token_counts, what its answer cost: `Costs`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from omni.config import DTYPES, MAX_TOKENS
from omni.engine import KV
from omni.inputs import InputError, Inputs
from omni.model import Generation, Omni, load_to_ask
from omni.processing.media.addresses import scheme_of
from omni.protocol import (
    OURS,
    PROTOCOLS,
    Reading,
    most_frames,
    pixel_bounds,
    published_method,
    published_reading,
    require_room,
    system_message,
)
from seats.method import Method
from seats.methods import method_for, require_name

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
except ImportError:  # a version that takes texts alone
    GenerationResult = TokenCounts = object

ON_ERROR = ("stop", "empty")
log = logging.getLogger(__name__)


class Costs(TokenCounts):
    """What an answer cost, as a sample of lmms-eval's log has it in token_counts.

    input_tokens, output_tokens: of the whole prompt and of the answer. kept_tokens: what runs of decoder layers saw,
    from the first to the last. reused_tokens: of the prompt, which an earlier request had run already. macs, full_macs,
    encode_seconds, prefill_seconds, decode_seconds: `omni.model.Stats`; seconds are those of the batch. error: why
    there is no answer, and nothing else.
    """

    def __init__(self, generation: Generation | None, error: str = "") -> None:
        self.costs: dict[str, Any] = {"error": error}
        if generation is not None:
            stats = generation.stats
            self.costs = {
                "input_tokens": sum(stats.tokens.values()),
                "output_tokens": stats.new_tokens,
                "kept_tokens": list(stats.segments),
                "reused_tokens": stats.reused_tokens,
                "macs": stats.macs,
                "full_macs": stats.full_macs,
                "encode_seconds": stats.encode_seconds,
                "prefill_seconds": stats.prefill_seconds,
                "decode_seconds": stats.decode_seconds,
            }

    def to_dict(self) -> dict[str, Any]:
        return self.costs


class Answer(str, GenerationResult):
    """A text, in which lmms-eval's evaluator also finds what it cost."""

    text: str
    token_counts: Costs

    def __new__(cls, text: str, costs: Costs) -> Answer:
        answer = super().__new__(cls, text)
        answer.text, answer.token_counts = text, costs
        return answer

    def __init__(self, *_: Any) -> None:
        """All is done: a text is made at once."""


def manifest() -> ModelManifest:
    return ModelManifest(model_id="seats_omni", chat_class_path="omni.lmms.SeatsOmni")


class SeatsOmni(lmms):
    """pretrained, revision, adapter, device, dtype, compile: `omni.load`. method, retention, video_ratio, audio_ratio:
    `seats.method_for`; retention=1 keeps every token. kv: `Omni.prefill`. fps, max_frames, min_pixels, max_pixels,
    total_pixels: `Omni.prepare`. use_audio_in_video: whether clips are heard. system_prompt: instead of the chat
    template's, or a file that has it. max_new_tokens: where a task says nothing. batch_size: requests together, of one
    plan each. seed: makes answers that a task draws at a temperature repeatable, by the same command in as many
    processes; none unless given. Each batch draws from a seed of its own, made of this one and of its first request's
    number, so that a task that asks one question several times gets several answers.

    protocol: "ours", where clips have their true times and their whole sound, and prompts keep to the model's context;
    or "paper", as the paper's authors ask (`omni.protocol`): frames from a clip's first to its last, 1.0 or 2.0 s per
    grid whatever is true, 300 s of sound at most, no limit of the context; and, unless other values are given, the
    task's system message and max_frames, the paper's pixels, kv=pruned and on_error=empty. Retentions that its tables
    do not have (`omni.protocol.published_method`) are refused at once, unless ratios are given; a method that cannot
    keep so little of a task's clips (`omni.protocol.require_room`), before the first question.
    on_error: "stop", where a request that fails ends the run, since a benchmark with holes is none; or "empty", where
    its answer is empty and a line in the log says why.

    Requests about the same files are asked one after another, so that they are read, encoded and prefilled once.
    Several processes (`accelerate launch`) share the requests out one by one, a replica of the model each: of questions
    about one clip each reads it for its own.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2.5-Omni-7B",
        revision: str | None = None,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        method: str = "seats",
        retention: float = 0.35,
        video_ratio: float | None = None,
        audio_ratio: float | None = None,
        protocol: str = "ours",
        on_error: str | None = None,
        kv: str | None = None,
        fps: float = 2.0,
        max_frames: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        use_audio_in_video: bool = True,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        batch_size: int | str = 1,
        seed: int | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval's own, of no use here
        if unknown:
            raise InputError(f"seats_omni has no setting {', '.join(sorted(unknown))}.")
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}.")
        if on_error not in (None, *ON_ERROR):
            raise InputError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}.")
        require_name(method)
        # Said here: where failures count as empty, it would leave nothing but empty answers.
        if kv not in (None, *KV):
            raise InputError(f"kv must be one of {', '.join(KV)}, not {kv!r}.")
        for name, value in (("retention", retention), ("fps", fps)):
            if not 0 < number(value) < math.inf:
                raise InputError(f"{name} must be a number above 0, not {value!r}.")
        for name, count in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if not 1 <= number(count) < math.inf:
                raise InputError(f"{name} must be 1 or more, not {count!r}.")
        if seed is not None and not (str(seed).isdecimal() and int(seed) < 2**63):
            raise InputError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r:.80}.")
        self.seed = None if seed is None else int(seed)
        from accelerate import Accelerator

        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._world_size > 1:
            self.accelerator = accelerator
            device = device if device == "cpu" or not torch.cuda.is_available() else str(accelerator.device)
        self.model = load_to_ask(
            str(pretrained),
            revision=revision,
            adapter=adapter,
            device=device,
            dtype=DTYPES[dtype] if dtype else None,
            compile=bool(compile),
        )
        self.published = protocol == "paper"
        self.on_error = on_error or ("empty" if self.published else "stop")
        self.kv = kv or ("pruned" if self.published else "layerwise")
        ratios = {"video_ratio": video_ratio, "audio_ratio": audio_ratio}
        given = {name: None if ratio is None else float(ratio) for name, ratio in ratios.items()}
        everything = float(retention) == 1 and set(given.values()) <= {None, 1}
        self.method: Method | None
        if everything:
            self.method = None
        elif self.published and set(given.values()) == {None}:
            self.method = published_method(method, self.model.config, float(retention))
        else:
            self.method = method_for(method, self.model.config, float(retention), **given)
        least = self.model.processor.sizes.min_frames
        if max_frames is not None and not least <= number(max_frames) < math.inf:
            raise InputError(f"max_frames must be {least} or more, not {max_frames!r}.")
        self.max_frames = None if max_frames is None else int(max_frames)
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
        self.reading = OURS
        if self.published:
            self.reading = published_reading(self.model.config)
            bounds = pixel_bounds(self.model.processor.sizes.factor)
            pixels = {name: bounds[name] if value is None else value for name, value in pixels.items()}
            lift_context_limit(self.model)
        self.media: dict[str, Any] = {"use_audio_in_video": bool(use_audio_in_video), "fps": float(fps), **pixels}
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self.max_new_tokens, self.batch_size = int(max_new_tokens), int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        from tqdm import tqdm

        for task in dict.fromkeys(request.args[4] for request in requests):
            self.require_room(task)
        self.answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model responding") as bar:
            for numbers, inputs, options in self.batches(requests):
                self.answer(requests, numbers, inputs, options)
                bar.update(len(self.answers) - bar.n)
        failed = [answer for answer in self.answers.values() if "error" in answer.token_counts.costs]
        if failed:
            log.warning("%d of %d answers failed and count as empty.", len(failed), len(requests))
        return [self.answers[number] for number in range(len(requests))]

    def require_room(self, task: str) -> None:
        """Raises InputError where the paper's protocol cannot run the method on a task's clips, whatever on_error says:
        every answer would be empty."""
        if not self.published or self.method is None:
            return
        frames, reading = self.frames(task), self.reading
        seconds = frames / self.media["fps"] if self.media["use_audio_in_video"] else 0.0
        try:
            require_room(self.method, self.model.config, frames, reading.heard(0.0, seconds)[1] or 0.0)
        except ValueError as error:
            raise InputError(f"{task} cannot be run so: {error}") from None

    def frames(self, task: str) -> int:
        """Of a clip at most."""
        if self.max_frames is not None:
            return self.max_frames
        return most_frames(task, self.model.config) if self.published else 768

    def answer(self, requests: list[Any], numbers: list[int], inputs: list[Inputs], options: dict[str, Any]) -> None:
        """Notes the answers to some of the requests. Where a batch fails and the run goes on, one after another."""
        if self.seed is not None and "temperature" in options:
            # Not their sum: the answers of the next seed would be these of the next request.
            options = {**options, "seed": Random(f"{self.seed} {numbers[0]}").getrandbits(63)}
        try:
            generations = self.model.generate(inputs, seats=self.method, kv=self.kv, **options)
        except Exception as error:
            if self.on_error == "stop":
                raise
            if len(inputs) == 1:
                self.fail(numbers[0], error)
                return
            for number, each in zip(numbers, inputs, strict=True):
                self.answer(requests, [number], [each], options)
            return
        for number, generation in zip(numbers, generations, strict=True):
            context, _, settings, *_ = requests[number].args
            text = cut(generation.text, ends_of(settings))
            self.answers[number] = Answer(text, Costs(generation))
            self.cache_hook.add_partial("generate_until", (context, settings), text)

    def fail(self, number: int, error: Exception) -> None:
        """An empty answer, which no cache keeps."""
        reason = f"{type(error).__name__}: {error}"
        log.warning("request %d counts as an empty answer: %s", number, reason)
        self.answers[number] = Answer("", Costs(None, reason))

    def batches(self, requests: list[Any]) -> Iterator[tuple[list[int], list[Inputs], dict[str, Any]]]:
        """Requests by number, prepared, whose plan and settings are the same, `batch_size` of them at most.

        Not more than eight batches are held at a time, so that a benchmark of hours of video fits in memory.
        """
        waiting: dict[Any, tuple[list[int], list[Inputs], dict[str, Any]]] = {}
        for number in self.by_media(requests):
            options = self.options(requests[number].args[2])
            try:
                inputs = self.prepare(self.messages(requests[number]), requests[number].args[4])
                key = self.model.engine.plan(inputs, self.method), tuple(sorted(options.items()))
            except Exception as error:
                if self.on_error == "stop":
                    raise
                self.fail(number, error)
                continue
            batch = waiting.setdefault(key, ([], [], options))
            batch[0].append(number)
            batch[1].append(inputs)
            if len(batch[0]) == self.batch_size:
                yield waiting.pop(key)
            elif len(waiting) == 8:
                yield waiting.pop(next(iter(waiting)))
        yield from waiting.values()

    def by_media(self, requests: list[Any]) -> list[int]:
        """The numbers of the requests, those about the same files one after another, where the first of them stands:
        what was read, encoded and prefilled for one is there for the next.

        Pictures and sounds that a data set brings decoded have no name to go by: a task whose first request has such
        stays as it is, and nothing of it is decoded twice.
        """
        first: dict[Any, int] = {}
        unnamed: set[tuple[str, str]] = set()
        places = []
        for number, request in enumerate(requests):
            *_, task, split = request.args
            try:
                media = None if (task, split) in unnamed else media_of(self.messages(request))
            except Exception:  # a document that is damaged: said where it is asked
                media = ()
            if media is None:
                unnamed.add((task, split))
            places.append(first.setdefault(media, number) if media else number)
        return sorted(range(len(requests)), key=places.__getitem__)

    def messages(self, request: Any) -> list[dict[str, Any]]:
        """lmms-eval's chat messages of a request."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages: list[dict[str, Any]] = doc_to_messages(self.task_dict[task][split][doc_id])
        return messages

    def prepare(self, messages: list[dict[str, Any]], task: str = "") -> Inputs:
        """lmms-eval's chat messages, whose media are under "url", → tensors. task: lmms-eval's name of it."""
        ours = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [piece for part in content for piece in pieces_of(part_of(part), self.reading)]
            ours.append({"role": message["role"], "content": content})
        system = system_message(task) if self.published and self.system_prompt is None else self.system_prompt
        if system is not None:
            ours = [message for message in ours if message["role"] != "system"]
            ours.insert(0, {"role": "system", "content": system})
        return self.model.processor.prepare(ours, max_frames=self.frames(task), reading=self.reading, **self.media)

    def options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A task's settings as `Omni.generate` takes them."""
        given = {name: value for name, value in settings.items() if value is not None and name not in PRESENTATION}
        lengths = [setting(name, int, given.pop(name)) for name in LENGTHS if name in given]
        options: dict[str, Any] = {"max_new_tokens": lengths[0] if lengths else self.max_new_tokens}
        if given.get("do_sample"):
            given.setdefault("temperature", 1.0)
        drawn = {name: setting(name, kind, given.pop(name)) for name, kind in DRAWN.items() if name in given}
        sampled = given.pop("do_sample", True) and drawn.get("temperature")
        if drawn.get("top_k") == 0:  # all, in the words of transformers
            del drawn["top_k"]
        given.pop("until", None)  # of the text: `ends_of`
        if given.get("num_beams", 1) == 1:
            given.pop("num_beams", None)
        if given:
            raise InputError(f"seats_omni cannot obey this task's generation_kwargs: {', '.join(sorted(given))}.")
        # As lmms-eval's own models have it: what draws counts for nothing where nothing is drawn.
        return options | drawn if sampled else options

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("seats_omni generates; it does not score given answers.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("seats_omni answers one question at a time.")


def number(value: Any) -> float:
    """Of a setting, which may be a text; not a number where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def setting(name: str, kind: type[int] | type[float], value: Any) -> int | float:
    """A task's number. Raises InputError where it is none of its kind."""
    given = number(value)
    if not math.isfinite(given) or kind(given) != given:
        raise InputError(f"{name} must be a {'whole ' * (kind is int)}number, not {value!r:.80}.")
    return kind(given)


def lift_context_limit(model: Omni) -> None:
    """Prompts longer than the model was made for are run all the same, as the paper's are."""
    decoder = replace(model.config.decoder, max_position_embeddings=MAX_TOKENS)
    model.config = model.thinker.config = replace(model.config, decoder=decoder)


LENGTHS = ("max_new_tokens", "max_gen_toks", "max_tokens")
"""Names that tasks have for one thing, of which the first goes before the others."""
DRAWN = {"temperature": float, "top_p": float, "top_k": int}
PRESENTATION = ("image_aspect_ratio", "use_cache")
"""Of other models' image processors and caches: nothing that a task asks of an answer."""


def ends_of(settings: dict[str, Any]) -> list[str]:
    """The texts at which a task ends an answer."""
    until = settings.get("until") or []
    ends = [until] if isinstance(until, str) else until
    if not isinstance(ends, (list, tuple)) or not all(isinstance(end, str) for end in ends):
        raise InputError(f"until must be a text or a list of texts, not {until!r:.80}.")
    return [end for end in ends if end]


def cut(text: str, ends: list[str]) -> str:
    """Up to the first of these; what comes after it is not part of the answer."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def media_of(messages: list[dict[str, Any]]) -> tuple[tuple[str, ...], ...] | None:
    """What a request is about, to tell whether two are about the same; None where a medium is no file."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    media = [part for content in contents for part in content if part["type"] != "text"]
    sources = [part.get("url", part.get(part["type"])) for part in media]
    if not all(isinstance(source, str) and scheme_of(source) != "data" for source in sources):
        return None
    return tuple(
        (part["type"], source, f"{part.get('start_time')} {part.get('end_time')}")
        for part, source in zip(media, sources, strict=True)
    )


def part_of(part: dict[str, Any]) -> dict[str, Any]:
    """One part of a message. start_time and end_time, where a task has them, are the stretch in seconds."""
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    source = part.get("url", part.get(kind))
    if isinstance(source, dict):  # a decoded sound of `datasets`
        source = source["array"], source["sampling_rate"]
    stretch = {f"{kind}_{name}": part.get(f"{name}_time") for name in ("start", "end")}
    return {"type": kind, kind: source, **stretch}


def pieces_of(part: dict[str, Any], reading: Reading) -> list[dict[str, Any]]:
    """A part; of a sound by itself that comes decoded all pieces of the length that is heard of one, since the paper's
    authors cut the sound of clips alone. A last piece of less than a tenth of a second may be no token and is left out.
    """
    length = reading.sound_seconds
    if length is None or part["type"] != "audio" or not isinstance(part["audio"], tuple):
        return [part]
    if part["audio_start"] is not None or part["audio_end"] is not None:
        return [part]
    samples, rate = part["audio"]
    count = max(1, math.ceil((max(torch.as_tensor(samples).shape) / rate - 0.1) / length))
    return [{**part, "audio_start": length * n, "audio_end": length * (n + 1)} for n in range(count)]
