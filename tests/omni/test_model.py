"""The public surface: prepare, prefill, generate, stream."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import omni
from omni.arguments import settings_parser
from omni.config import ConfigError, read_config
from omni.engine import KV
from omni.inputs import InputError
from omni.processing.processor import Processor
from omni.processing.tokenizer import TokenizerError
from omni.runtime.sampling import Sampling, pick
from seats import method_for, preset_for
from tests.omni.pairs import ENVIRONMENT, FAMILIES, TEXT, Pair, make_request
from weights import CheckpointError

REQUEST = [("text", 5), ("video", 3, 6, 8, 1.0, 420), ("text", 4)]


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair(seed=5)


@pytest.fixture(scope="module")
def deep(make_pair):
    """Of as many layers as the stages need."""
    return make_pair(text={"num_hidden_layers": 6})


def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_stream_is_the_answer_in_pieces(model: omni.Omni, clip: Path) -> None:
    """Pieces join to the text of `generate`, and the generator's value is the Generation."""
    inputs = model.prepare(chat({"type": "video", "video": clip}, {"type": "text", "text": "What?"}))
    stream, pieces = model.stream(inputs, max_new_tokens=40, temperature=1.5, seed=4), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            answer = stop.value
            break
    whole = model.generate(inputs, max_new_tokens=40, temperature=1.5, seed=4)
    assert whole.tokens == answer.tokens
    assert "".join(pieces) == answer.text == whole.text
    assert len(pieces) > 1


def test_prepared_equals_transformers_processor(model: omni.Omni, checkpoint: Path) -> None:
    """Token ids, patches and log-mel of a prompt with picture and sound are those of transformers' processor."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils.chat_template_utils import render_jinja_template

    class Processor(transformers.Qwen2_5OmniProcessor):
        def check_argument_for_proper_class(self, name: str, argument: object) -> None:
            """Its video processor needs torchvision; this prompt has no clip."""

    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(checkpoint)
    names = {"image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>"}
    names |= {"vision_bos": "<|vision_bos|>", "vision_eos": "<|vision_eos|>"}
    names |= {"audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>"}
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True)
    public = Processor(Qwen2VLImageProcessorPil(), None, extractor, tokenizer)

    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (100, 150, 3), dtype=np.uint8)
    sound = (0.1 * random.standard_normal(50_000)).astype(np.float32)
    question = {"type": "text", "text": "What is this, “here”?"}
    inputs = model.prepare(chat({"type": "image", "image": picture}, {"type": "audio", "audio": sound}, question))
    bare = chat({"type": "image"}, {"type": "audio"}, question)
    rendered = render_jinja_template([bare], chat_template=model.processor.template, add_generation_prompt=True)
    batch = public(text=rendered[0][0], images=[picture], audio=[sound], return_tensors="pt")
    assert torch.equal(inputs.input_ids, batch["input_ids"])
    assert torch.equal(inputs.image_grid_thw, batch["image_grid_thw"])
    step = 1 / 255 / 0.26
    torch.testing.assert_close(inputs.pixel_values, batch["pixel_values"], atol=step, rtol=0)
    frames = inputs.input_features.shape[2]
    assert batch["feature_attention_mask"].sum() == frames
    torch.testing.assert_close(inputs.input_features, batch["input_features"][:, :, :frames], atol=1e-4, rtol=0)
    theirs = omni.Inputs(**batch)
    torch.testing.assert_close(model.prefill(theirs).logits, model.prefill(inputs).logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bf16"}, InputError, "dtype must be one of .*bfloat16.*, not 'bf16'"),
        ({"dtype": torch.int8}, InputError, "dtype must be one of .*, not torch.int8"),
        ({"device": "meta"}, InputError, "device 'meta' cannot be used here"),
        ({"device": "gpu"}, InputError, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, InputError, "device 'cuda:99' cannot be used here"),
        ({"device": 1.5}, InputError, "device '1.5' cannot be used here"),
        ({"reuse": "1GB"}, ValueError, "reuse must be a whole number, not '1GB'"),
        ({"adapter": 5}, CheckpointError, "'5' is neither an existing folder nor a hub id"),
    ],
)
def test_what_cannot_be_loaded_with_is_one_sentence(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        omni.load(checkpoint, **{"device": "cpu", **options})


def test_a_dtype_has_a_name(checkpoint: Path) -> None:
    assert omni.load(checkpoint, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_logits_that_are_no_numbers_are_no_answer(make_pair) -> None:
    """Protects: their likeliest token would be the first of the vocabulary, and the answer "!!!!"."""
    model = make_pair(text={"num_hidden_layers": 6}).model
    inputs = make_request(SimpleNamespace(model=model), [("text", 9)])
    model.thinker.layers[1].mlp.down.weight.data[0] = float("nan")
    for seats in (None, 0.1):
        with pytest.raises(InputError, match="what the model makes of this prompt in float32 are no numbers"):
            model.generate(inputs, max_new_tokens=3, seats=seats, stop_token_ids=[])


def test_an_adapter_beside_weights_is_not_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    """Protects: transformers would add it; whether it is merged already, nothing tells."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds adapter_config\.json beside its weights"):
        omni.load(folder, device="cpu")


def test_tokens_that_are_not_listed_are_missed(checkpoint: Path, tmp_path: Path) -> None:
    """Protects: without their list <|im_start|> would be spelled out, and the answer be noise."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer_config.json").unlink()
    words = r"lists no added token <\|im_start\|>, <\|im_end\|>, \d+ \(image\)"
    with pytest.raises(TokenizerError, match=words):
        omni.model.load_to_ask(folder, device="cpu")
    with pytest.warns(UserWarning, match=words):
        model = omni.load(folder, device="cpu")
    assert len(model.generate(omni.Inputs([[1, 2, 3]]), max_new_tokens=2, stop_token_ids=[]).tokens) == 2
    with pytest.raises(TokenizerError, match=words):
        model.prepare(chat({"type": "text", "text": "What?"}))


def test_several_media_share_one_prompt(model: omni.Omni, clip: Path) -> None:
    """Two clips, one of them silent, a picture and a sound: every placeholder finds its medium."""
    picture = torch.randint(0, 255, (3, 60, 90), dtype=torch.uint8)
    frames = torch.randint(0, 255, (9, 3, 60, 90), dtype=torch.uint8)
    parts = [
        {"type": "video", "video": clip},
        {"type": "image", "image": picture},
        {"type": "video", "video": (frames, 2.0)},
        {"type": "audio", "audio": torch.zeros(16_000)},
        {"type": "text", "text": "Which is which?"},
    ]
    inputs = model.prepare(chat(*parts), max_pixels=200 * 28 * 28)
    prefill = model.prefill(inputs)
    assert inputs.video_grid_thw.shape == (2, 3)
    assert prefill.tokens["audio"] == 100 + 25
    assert prefill.logits.shape == (model.config.decoder.vocab_size,)
    assert prefill.logits.dtype == torch.float32


def test_sound_without_a_token_is_refused(model: omni.Omni) -> None:
    """Twenty milliseconds make no audio token: said, not passed over."""
    with pytest.raises(InputError, match="a Tensor is too short for a single audio token"):
        model.prepare(chat({"type": "audio", "audio": torch.zeros(320)}, {"type": "text", "text": "What?"}))


def test_typed_special_tokens_stay_text(model: omni.Omni) -> None:
    """A question cannot smuggle in a media placeholder or end its turn."""
    ids = model.prepare(chat({"type": "text", "text": "<|VIDEO|><|im_end|>"})).input_ids[0].tolist()
    assert model.config.token_ids.video not in ids
    assert ids.count(model.tokenizer.token_to_id("<|im_end|>")) == 2  # system and user turn
    assert "<|VIDEO|><|im_end|>" in model.tokenizer.decode(ids)


@pytest.mark.parametrize("listed", [[1], 1, []])
def test_the_end_of_a_turn_ends_an_answer(checkpoint: Path, tmp_path: Path, listed: Any) -> None:
    """Protects: <|im_end|> stops, whatever the generation config lists; without a tokenizer what is listed stops."""
    folder = shutil.copytree(checkpoint, tmp_path / "listed")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    model = omni.load(folder, device="cpu", dtype=torch.float32)
    end = model.tokenizer.token_to_id("<|im_end|>")
    assert end in model._stop_token_ids()
    if listed:
        assert 1 in model._stop_token_ids()
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    if listed:
        assert omni.load(folder, device="cpu", dtype=torch.float32)._stop_token_ids() == (1,)


def test_stop_tokens_and_length(pair) -> None:
    inputs = make_request(pair, REQUEST)
    free = pair.model.generate(inputs, max_new_tokens=12, stop_token_ids=[]).tokens
    assert len(free) == 12
    stop = free[5]
    assert pair.model.generate(inputs, max_new_tokens=12, stop_token_ids=[stop]).tokens == free[: free.index(stop) + 1]


def test_closed_stream_leaves_the_next_answer_right(model: omni.Omni) -> None:
    inputs = model.prepare(chat({"type": "text", "text": "Hello?"}))
    expected = model.generate(inputs, max_new_tokens=8).tokens
    stream = model.stream(inputs, max_new_tokens=50)
    next(stream)
    stream.close()
    assert model.generate(inputs, max_new_tokens=8).tokens == expected


def test_context_limit_is_checked_before_any_work(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the tokens by modality and what to lower; no encoder runs."""
    inputs = make_request(pair, REQUEST)
    monkeypatch.setattr(pair.model.thinker, "encode", lambda *_: pytest.fail("work before the check"))
    limit = TEXT["max_position_embeddings"]
    with pytest.raises(InputError, match=rf"36 video, 105 audio.* more than the model's {limit}.*max_frames"):
        pair.model.generate(inputs, max_new_tokens=limit, stop_token_ids=[])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, r"input_ids must be \(1, S\)"),
        ({"input_ids": torch.tensor([[5, 640]])}, "token ids from 0 to 639"),
        ({"pixel_values_videos": None}, "go together"),
        ({"pixel_values_videos": torch.zeros(7, 1176)}, "its grid_thw asks for"),
        ({"video_grid_thw": torch.tensor([[3, 6, 6]])}, "placeholders but its media make"),
        ({"video_grid_thw": torch.tensor([[3, 0, 6]])}, "positive counts"),
        ({"input_features": None, "feature_attention_mask": None}, "placeholders but its media make 0"),
        ({"input_features": torch.zeros(128, 420)}, "3 dimensions"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(pair, change: dict[str, Any], words: str) -> None:
    from dataclasses import replace

    inputs = make_request(pair, REQUEST)
    with pytest.raises(InputError, match=words):
        pair.model.prefill(replace(inputs, **change))


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"seed": 2**64}, {"seed": -1}])
def test_options_out_of_range_are_refused(pair, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        pair.model.generate(make_request(pair, [("text", 3)]), stop_token_ids=[], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_answered_can_be_trained(make_pair, family: str) -> None:
    """Tables that an answer leaves behind are not of inference mode, which autograd refuses."""
    model = make_pair(family).model
    inputs = make_request(Pair(None, model), REQUEST)
    model.prefill(inputs)
    features, _ = model.thinker.requires_grad_().encode(inputs)
    sum(tokens.sum() for tokens in features.values()).backward()
    assert all(parameter.grad is not None for parameter in model.thinker.vision.parameters())


def test_masked_positions_are_dropped(pair) -> None:
    """transformers pads on the left; what the mask hides does not count."""
    inputs = make_request(pair, [("text", 9)])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), inputs.input_ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    masked = omni.Inputs(input_ids=padded, attention_mask=mask)
    assert torch.equal(pair.model.prefill(masked).logits, pair.model.prefill(inputs).logits)


def test_import_is_light() -> None:
    """`import omni` needs no media, template, tokenizer or hub library."""
    heavy = ["av", "PIL", "jinja2", "sentencepiece", "transformers", "huggingface_hub", "matplotlib"]
    code = f"import sys, omni; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Protects: no id reaches the embedding that it has no row for."""
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["600"] = {"content": "<x>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=r"the tokenizer has ids up to 600, the model up to \d+: its files belong"):
        Processor(tmp_path, read_config(tmp_path))


def test_selection_is_a_number_a_name_or_a_method(deep: Pair) -> None:
    """A number is the family's preset, a name a method at 0.35; anything else is said in one sentence."""
    inputs = make_request(deep, [("text", 5), ("video", 5, 6, 10, 1.0, 530), ("text", 4)])
    config = deep.model.config
    for given, method in ((0.35, preset_for(config, 0.35)), ("divprune-om", method_for("divprune-om", config))):
        prefill = deep.model.prefill(inputs, seats=given)
        assert prefill.method == method
        assert [kept.tolist() for kept in prefill.kept] == [
            kept.tolist() for kept in deep.model.prefill(inputs, seats=method).kept
        ]
        options = {"max_new_tokens": 3, "stop_token_ids": []}
        answer = deep.model.generate(inputs, seats=given, **options)
        assert answer.tokens == deep.model.generate(inputs, seats=method, **options).tokens
    with pytest.raises(ValueError, match="No method 'fast'; choose one of seats, random"):
        deep.model.prefill(inputs, seats="fast")
    with pytest.raises(ValueError, match=r"retention must lie in \(0, 1\], not 35"):
        deep.model.generate(inputs, seats=35, **options)
    for wrong in (True, [0.35]):
        with pytest.raises(TypeError, match="seats must be a retention, a method's name, a method or None"):
            deep.model.prefill(inputs, seats=wrong)


def test_what_is_no_request_is_said(deep: Pair) -> None:
    inputs = make_request(deep, [("text", 5)])
    with pytest.raises(TypeError, match=r"stream answers one request, omni\.Inputs; generate takes a list"):
        next(deep.model.stream([inputs, inputs]))
    for ask in (deep.model.prefill, deep.model.generate):
        with pytest.raises(TypeError, match=r"a request must be omni.Inputs, which Omni.prepare makes"):
            ask([{"role": "user", "content": "What?"}])
        with pytest.raises(TypeError, match=r"a request must be omni.Inputs, which Omni.prepare makes"):
            ask(None)


def test_decoding_sees_video_and_sound_unless_told_otherwise(deep: Pair) -> None:
    """The default cache is what each layer attended to, everywhere."""
    inputs = make_request(deep, [("text", 5), ("video", 40, 6, 10, 1.0, 4000), ("text", 4)])
    sizes = {kv: deep.model.prefill(inputs, seats=0.35, kv=kv).cache.lengths.tolist() for kv in KV}
    assert sizes["layerwise"] != sizes["pruned"]
    assert deep.model.prefill(inputs, seats=0.35).cache.lengths.tolist() == sizes["layerwise"]
    bytes_of = {
        kv: deep.model.generate(inputs, seats=0.35, kv=kv, max_new_tokens=2, stop_token_ids=[]).stats.cache_bytes
        for kv in KV
    }
    answer = deep.model.generate(inputs, seats=0.35, max_new_tokens=2, stop_token_ids=[])
    assert answer.stats.cache_bytes == bytes_of["layerwise"] > bytes_of["pruned"]
    assert settings_parser().parse_args([]).kv == "layerwise"


def test_one_line_says_what_it_is(model: omni.Omni, deep: Pair, clip: Path) -> None:
    """In a notebook, where a cell's value is printed: counts and text, no tensors."""
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens?"}]
    inputs = model.prepare([{"role": "user", "content": content}])
    length = inputs.input_ids.shape[1]
    assert repr(inputs) == f"Inputs({length} tokens, 1 clip, 1 sound)"
    prefill = model.prefill(inputs, seats=0.35)
    assert repr(prefill).startswith(f"Prefill({prefill.tokens['text']} text, ")
    assert f"tokens, kept {' > '.join(map(str, prefill.segments))}, " in repr(prefill)
    assert "kept" not in repr(model.prefill(inputs))
    answer = model.generate(inputs, seats=0.35, max_new_tokens=4)
    assert repr(answer).startswith("Generation(") and "4 tokens" in repr(answer)
    inputs = make_request(deep, [("text", 5)])  # of a checkpoint without a tokenizer
    assert repr(deep.model.generate(inputs, max_new_tokens=3, stop_token_ids=[])).startswith("Generation(3 tokens, ")
    for each in (inputs, prefill, answer):
        assert "\n" not in repr(each) and "tensor(" not in repr(each) and len(repr(each)) < 250


def test_a_request_is_saved_and_read(deep: Pair, tmp_path: Path) -> None:
    inputs = make_request(deep, [("text", 3), ("image", 4, 6), ("video", 2, 4, 6, 1.0, 99), ("audio", 77), ("text", 2)])
    path = tmp_path / "request.safetensors"
    inputs.save(path)
    again = omni.Inputs.load(path)
    for field in fields(inputs):
        before, after = getattr(inputs, field.name), getattr(again, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert torch.equal(deep.model.prefill(again, seats=0.35).logits, deep.model.prefill(inputs, seats=0.35).logits)
    assert list(tmp_path.iterdir()) == [path]
    silent = replace(inputs, use_audio_in_video=False)
    silent.save(str(path))
    assert not omni.Inputs.load(str(path)).use_audio_in_video


def test_what_holds_no_request_is_said(deep: Pair, tmp_path: Path) -> None:
    inputs = make_request(deep, [("text", 3)])
    with pytest.raises(InputError, match="cannot be written"):
        inputs.save(tmp_path / "nowhere" / "request.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        omni.Inputs.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("What?" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        omni.Inputs.load(tmp_path / "text")
    save_file({"input_ids": inputs.input_ids}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"holds no request: Inputs.save writes them"):
        omni.Inputs.load(tmp_path / "other.safetensors")


def test_the_packages_names_wait_until_they_are_asked_for() -> None:
    """And `omni.show` is the function, whether or not its file was imported before."""
    code = """
import sys, omni
assert "torch" not in sys.modules
import omni.show
from omni import show
assert callable(omni.show) and omni.show is show
assert all(getattr(omni, name) for name in omni.__all__) and set(omni.__all__) <= set(dir(omni))
try: omni.nothing
except AttributeError as error: assert "'omni' has no attribute 'nothing'" in str(error)
else: raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def padded_sounds(inputs: omni.Inputs, pads: tuple[int, int], *, left: bool) -> dict[str, Any]:
    """The fields of a request whose sounds have as many frames more that their mask leaves out, of NaN."""
    mel, mask = inputs.input_features, inputs.feature_attention_mask
    before, after = pads if left else pads[::-1]
    return {
        **{
            name: value
            for name, value in inputs.tensors().items()
            if name not in ("input_features", "feature_attention_mask")
        },
        "input_features": torch.nn.functional.pad(mel, (before, after), value=float("nan")),
        "feature_attention_mask": torch.nn.functional.pad(mask, (before, after)),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [[("audio", 437)], [("audio", 57), ("audio", 83)], [("audio", 30), ("audio", 220)]])
@pytest.mark.parametrize("left", [True, False])
def test_sounds_wherever_their_mask_puts_them(make_pair, family: str, parts: list[tuple], left: bool) -> None:
    """Padded on the left, on the right or with a hole: transformers' answer; what is masked is not read, NaN or not."""
    pair = make_pair(family)
    inputs = make_request(pair, [("text", 5), *parts, ("text", 4)])
    expected = pair.model.prefill(inputs).logits
    torch.testing.assert_close(expected, pair.reference_logits(inputs), atol=1e-4, rtol=0)
    fields = padded_sounds(inputs, (23, 4), left=left)
    found = pair.model.prefill(omni.Inputs(**fields)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    fields["feature_attention_mask"] = fields["feature_attention_mask"].bool()
    hole = 23 + 11 if left else 4 + 11  # a frame less of every sound, in the middle of it
    fields["feature_attention_mask"][:, hole] = False
    shorter = [(kind, frames - 1) for kind, frames in parts]
    if all(
        pair.model.config.audio.token_count(a[1]) == pair.model.config.audio.token_count(b[1])
        for a, b in zip(parts, shorter, strict=True)
    ):
        theirs = {**fields, "input_features": fields["input_features"].nan_to_num()}
        ids = theirs["input_ids"]
        logits = pair.reference(**theirs, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        torch.testing.assert_close(pair.model.prefill(omni.Inputs(**fields)).logits, logits, atol=1e-4, rtol=0)


def test_nan_behind_a_short_sound_is_not_read(make_pair) -> None:
    """Qwen3-Omni convolves sounds of less than a second together; what is behind the shorter one is no sound."""
    pair = make_pair("qwen3")
    inputs = make_request(pair, [("text", 5), ("audio", 57), ("audio", 83), ("text", 4)])
    expected = pair.model.prefill(inputs).logits
    inputs.input_features[0, :, 57:] = float("nan")
    assert torch.equal(pair.model.prefill(inputs).logits, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_attention_mask": torch.ones(1, 500)}, r"must be \(sounds, frames\)"),
        ({"feature_attention_mask": torch.ones(1, 300)}, r"must be \(sounds, frames\)"),
        ({"feature_attention_mask": torch.ones(2, 420)}, r"must be \(sounds, frames\)"),
        ({"feature_attention_mask": torch.zeros(1, 420)}, "leaves nothing of sound 1"),
        ({"input_features": torch.zeros(1, 80, 420)}, "80 mel bins but the model takes 128"),
        ({"input_features": torch.zeros(1, 128, 420, dtype=torch.int32)}, "must be floating point"),
        ({"video_grid_thw": torch.tensor([[4.0, 6.0, 6.0]])}, "positive counts"),
        ({"video_grid_thw": torch.tensor([[4, 2**31, 2**31]])}, "placeholders but its media make"),
        ({"video_second_per_grid": torch.tensor([1e30])}, "must be seconds above 0"),
        ({"video_second_per_grid": torch.tensor([float("nan")])}, "must be seconds above 0"),
        ({"video_second_per_grid": torch.tensor([1.0, 1.0])}, "one per clip"),
        ({"video_second_per_grid": "1"}, "must be a tensor"),
        ({"video_second_per_grid": ["1"]}, "is no tensor"),
        ({"input_ids": torch.zeros(1, 5)}, "must be integers"),
        ({"attention_mask": "left"}, "must be a tensor"),
        ({"attention_mask": torch.zeros(1, 5)}, "must have the shape of input_ids|leaves no token"),
        ({"input_ids": torch.zeros(1, 5).to_sparse()}, "must be a dense tensor"),
        ({"feature_attention_mask": torch.ones(1, 420, device="meta")}, "must be a dense tensor"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.uint64)}, "must be integers"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_make_no_request_are_refused(pair, change: dict[str, Any], words: str) -> None:
    from dataclasses import replace

    inputs = make_request(pair, REQUEST)
    assert inputs.input_features.shape[2] == 420
    with pytest.raises(InputError, match=words):
        pair.model.prefill(replace(inputs, **change))


@pytest.mark.parametrize("parts", [[("audio", 1)], [("audio", 200), ("audio", 2)]])
def test_sounds_without_a_token_are_refused(pair, parts: list[tuple]) -> None:
    inputs = make_request(pair, [("text", 5), *parts, ("text", 4)])
    with pytest.raises(InputError, match=rf"sound {len(parts)} is too short for a single audio token"):
        pair.model.prefill(inputs)


@pytest.mark.parametrize("value", [2, -1, 0.5, -np.inf, np.nan])
def test_masks_that_are_none(pair, value: float) -> None:
    """Protects: of a mask that is added to scores, 0 and -inf, the wrong half would be taken."""
    inputs = make_request(pair, REQUEST)
    for name, like in (("attention_mask", inputs.input_ids), ("feature_attention_mask", inputs.feature_attention_mask)):
        mask = torch.ones(like.shape).index_fill(1, torch.arange(3), value)
        with pytest.raises(InputError, match=f"{name} must be of ones"):
            replace(inputs, **{name: mask})


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, iter, set])
def test_stop_tokens_of_any_kind_are_obeyed(pair, kind: Any) -> None:
    inputs = make_request(pair, REQUEST)
    free = pair.model.generate(inputs, max_new_tokens=12, stop_token_ids=[]).tokens
    stopped = pair.model.generate(inputs, max_new_tokens=12, stop_token_ids=kind([free[5]]))
    assert stopped.tokens == free[: free.index(free[5]) + 1]


@pytest.mark.parametrize("given", ["</s>", ["</s>"], [1.5], torch.tensor([0.5]), [None], [-1], [1, 10**6]])
def test_stop_tokens_that_are_none_are_refused(pair, given: Any) -> None:
    with pytest.raises(ValueError, match="stop_token_ids must be token ids"):
        pair.model.generate(make_request(pair, [("text", 3)]), stop_token_ids=given)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_new_tokens", value) for value in (2.5, "3", None, [3])),
        *(("seed", value) for value in (1.0, "x")),
        *(("temperature", value) for value in (None, "warm", float("nan"), [0.5])),
        *(("top_p", value) for value in ("half", [0.5])),
        *(("top_k", value) for value in (2.5, "5")),
    ],
)
def test_options_that_are_no_numbers_are_refused(pair, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a"):
        pair.model.generate(make_request(pair, [("text", 3)]), **{"temperature": 0.5, option: value})


@pytest.mark.parametrize("ask", ["generate", "stream"])
def test_what_draws_is_refused_where_nothing_is_drawn(model: omni.Omni, tmp_path: Path, monkeypatch, ask: str) -> None:
    """Not passed over: who gives it takes the answer for a draw. A checkpoint's own are of its temperature."""
    inputs = model.prepare([{"role": "user", "content": "Why?"}])

    def refused(**options: Any) -> str:
        with pytest.raises(InputError) as caught:
            list(getattr(model, ask)(inputs, max_new_tokens=1, **options))
        return str(caught.value)

    why = "must have a temperature above 0: at 0 nothing is drawn."
    assert refused(top_p=0.9) == f"top_p {why}"
    assert refused(top_k=1, top_p=0.5, temperature=0) == f"top_p and top_k {why}"
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "top_p": 0.5}))
    monkeypatch.setattr(model, "folder", tmp_path)
    assert refused(top_k=3, temperature="checkpoint") == f"top_k {why}"
    stops = {"max_new_tokens": 2, "stop_token_ids": []}
    greedy = model.generate(inputs, **stops).tokens
    assert model.generate(inputs, top_p=1.0, **stops).tokens == greedy  # what cuts nothing is sent by many
    assert model.generate(inputs, temperature="checkpoint", **stops).tokens == greedy


def test_options_of_numpy_and_torch_are_obeyed(pair) -> None:
    inputs = make_request(pair, REQUEST)
    plain: dict[str, Any] = {
        "stop_token_ids": [],
        "max_new_tokens": 4,
        "seed": 3,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 5,
    }
    arrays = {key: (torch.tensor if n % 2 else np.array)(plain[key]) for n, key in enumerate(plain)}
    assert pair.model.generate(inputs, **arrays).tokens == pair.model.generate(inputs, **plain).tokens


def test_options_that_there_are_not_are_named(pair) -> None:
    with pytest.raises(TypeError, match="no option max_tokens; it has max_new_tokens, temperature"):
        pair.model.generate(make_request(pair, [("text", 3)]), max_tokens=3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-9, 1e30, 1e300])
def test_every_temperature_draws(temperature: float) -> None:
    """The colder ones the likeliest token, whatever the logits; the hotter ones any."""
    logits = torch.tensor([[-3.0, 2.0, 2.5, 1.0], [-4e4, -5e4, -4.5e4, -6e4]])
    sampling = Sampling(temperature)
    drawn = {tuple(pick(logits, sampling, torch.empty(2, 4).exponential_()).tolist()) for _ in range(50)}
    assert drawn == {(2, 0)} if temperature < 1 else len(drawn) > 8
    if temperature < 1:
        logits[0, 1] = 2.5  # two alike share
        drawn = {int(pick(logits, sampling, torch.empty(2, 4).exponential_())[0]) for _ in range(50)}
        assert drawn == {1, 2}
