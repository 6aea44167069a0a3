"""LoRA adapters against PEFT itself: the merged weights give PEFT's own logits; what is no plain LoRA is named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import omni
from omni.generate import main
from tests.omni.pairs import FAMILIES, Pair, as_batch, make_request
from weights import CheckpointError

peft = pytest.importorskip("peft")

REQUEST = [("text", 5), ("image", 6, 8), ("video", 3, 6, 6, 1.0, 420), ("text", 4)]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "qwen2_5": {
        "attention": DECODER[:4],
        "MLP and head": ["gate_proj", "up_proj", "down_proj", "lm_head"],
        # Of both encoders: attention, MLP, mergers, projections, convolutions of one and of three dimensions.
        "encoders": r".*(visual|audio_tower)\..*\b(q|k|v|proj|q_proj|out_proj|fc1|fc2|mlp\.0|mlp\.2|conv1)",
    },
    "qwen3": {
        "attention": DECODER,
        "MLP and head": ["gate_proj", "up_proj", "down_proj", "lm_head"],
        "encoders": "qkv attn.proj patch_embed.proj linear_fc1 linear_fc2 mlp.2 fc1 proj2 conv2d2 out_proj".split(),
    },
}
EXTRAS = {
    "attention": {"use_rslora": True},
    "MLP and head": {"rank_pattern": {r"layers\.0\.mlp\.up_proj": 2, "lm_head": 5}, "alpha_pattern": {"up_proj": 11}},
    "encoders": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(request.param, seed=31)


def family_of(pair: Pair) -> str:
    return "qwen3" if pair.model.config.family == "qwen3_omni_moe" else "qwen2_5"


def train(pair: Pair, folder: Path, targets: Any, **options: Any) -> tuple[Any, Path]:
    """An adapter with random factors, saved by PEFT, and PEFT's own merged model."""
    torch.manual_seed(7)
    config = peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **options})
    adapted = peft.get_peft_model(copy.deepcopy(pair.reference), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval(), folder


@pytest.mark.parametrize("part", EXTRAS)
def test_logits_are_those_of_the_model_that_peft_merges(pair: Pair, tmp_path: Path, part: str) -> None:
    """Protects: every kind of layer, scales, ranks and alphas: within 1e-5 in float32 of PEFT's own merge."""
    targets = TARGETS[family_of(pair)][part]
    merged, folder = train(pair, tmp_path / "adapter", targets, **EXTRAS[part])
    model = omni.load(pair.model.folder, adapter=folder, device="cpu", dtype=torch.float32)
    inputs = make_request(pair, REQUEST)
    expected = merged(**as_batch(inputs), use_cache=False).logits[0, -1].float()
    assert (expected - pair.reference_logits(inputs)).abs().max() > 1e-2, "the adapter changes nothing"
    torch.testing.assert_close(model.prefill(inputs).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_experts_are_adapted_together(
    make_pair: Callable[..., Pair], tmp_path: Path, parameters: list[str], fused: bool
) -> None:
    """Protects: transformers 5 has one parameter for all experts, and so has PEFT; checkpoints have them either way."""
    pair = make_pair("qwen3", seed=33)
    named = [f"mlp.experts.{parameter}" for parameter in parameters]
    merged, folder = train(pair, tmp_path / "adapter", ["q_proj"], target_parameters=named)
    base = pair.model.folder
    if fused:
        base = tmp_path / "base"
        pair.reference.save_pretrained(base, save_original_format=False)
    model = omni.load(base, adapter=folder, device="cpu", dtype=torch.float32)
    inputs = make_request(pair, REQUEST)
    expected = merged(**as_batch(inputs), use_cache=False).logits[0, -1].float()
    torch.testing.assert_close(model.prefill(inputs).logits, expected, atol=1e-5, rtol=0)
    without = rewrite(folder, tmp_path / "other", target_parameters=None)
    if len(parameters) == 1:
        with pytest.raises(CheckpointError, match=r"adapts a parameter that target_parameters .* does not tell"):
            omni.load(base, adapter=without, device="cpu")


def rewrite(folder: Path, to: Path, spell: Callable[[str], str] = str, **settings: Any) -> Path:
    """An adapter under other names, its settings changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    save_file({spell(name): tensor for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return to


@pytest.fixture(scope="module")
def adapter(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, folder = train(pair, tmp_path_factory.mktemp("adapter"), r".*(layers\.0\.self_attn\.q_proj|blocks\.0\..*proj)")
    return folder


def released(name: str) -> str:
    """As PEFT writes it beside transformers 4, from whatever it wrote here."""
    name = name.replace("model.model.language_model.", "model.model.")
    return re.sub(r"^base_model\.model\.model\.(audio_tower|visual)\.", r"base_model.model.\1.", name)


def whole(name: str) -> str:
    return name.replace("base_model.model.", "base_model.model.thinker.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "of transformers 4, thinker alone": released,
    "of transformers 4, whole model": lambda name: released(name).replace(
        "base_model.model.", "base_model.model.thinker."
    ),
    "without PEFT's prefix": lambda name: released(name).removeprefix("base_model.model."),
    "without PEFT's prefix, whole model": lambda name: "thinker." + released(name).removeprefix("base_model.model."),
    "of transformers 5, whole model": whole,
}


def parameters(model: omni.Omni) -> dict[str, Tensor]:
    return dict(model.thinker.named_parameters())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_with_and_without_prefixes(pair: Pair, adapter: Path, tmp_path: Path, spelling: str) -> None:
    """Protects: adapters of either transformers, of the whole model or its thinker, change the same numbers alike."""
    other = rewrite(adapter, tmp_path / "other", SPELLINGS[spelling])
    expected, got = (
        parameters(omni.load(pair.model.folder, adapter=folder, device="cpu", dtype=torch.float32))
        for folder in (adapter, other)
    )
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(expected["layers.0.attention.qkv.weight"], pair.model.thinker.layers[0].attention.qkv.weight)


def test_sums_are_rounded_once(pair: Pair, adapter: Path) -> None:
    """Protects: in bfloat16 the merged weight is the float32 one rounded, not a sum of rounded ones."""
    exact, rounded = (
        parameters(omni.load(pair.model.folder, adapter=adapter, device="cpu", dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora = True is not supported: merge it with PEFT"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only': only 'none' is supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = [[0, 2], [1, 3]] is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices = [5] is not supported"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens = [5] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base, too"),
        ({"some_later_variant": {"x": 1}}, "some_later_variant = {'x': 1} is not supported"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': only 'LORA' is supported"),
        ({"r": 3}, "has factors of rank 4, adapter_config.json says 3"),
        ({"lora_alpha": None}, "has no alpha up to 1e+09: adapter_config.json says None"),
        ({"lora_alpha": 10**400}, "has no alpha up to 1e+09"),
        ({"use_rslora": "false"}, "use_rslora = 'false': it must be true or false"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern has a key that is no pattern"),
        ({"alpha_pattern": {"(" * 4000 + ")" * 4000: 3}}, "alpha_pattern has a key that is no pattern"),
        ({"alpha_pattern": {"a{99999999999}": 3}}, "alpha_pattern has a key that is no pattern"),
        ({"rank_pattern": [3]}, "rank_pattern must be an object"),
        ({"rank_pattern": {f"m{index}": 1 for index in range(50_001)}}, "rank_pattern has 50001 patterns"),
    ],
)
def test_what_is_no_plain_lora_is_named(
    pair: Pair, adapter: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """Protects: nothing of an adapter is passed over in silence, and nothing is half loaded."""
    with pytest.raises(CheckpointError, match=re.escape(words)):
        omni.load(pair.model.folder, adapter=rewrite(adapter, tmp_path / "other", **settings), device="cpu")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\w+\.?)+x",
        r"(.*)*x",
        r"((.)?){0,30}x",
        r"(.|.)" * 30 + "x",
        r".?" * 30 + "x",
        r".*" * 6 + "x",
        "?x:(.+) +x",  # the repetition of a group, hidden by the flag that allows spaces
        r"(?#\)+(.+)(?#)+x",
        "a" * 10_001,
    ],
)
def test_patterns_that_could_match_for_ever_are_refused(
    pair: Pair, adapter: Path, tmp_path: Path, pattern: str
) -> None:
    """Protects: the keys are regular expressions of a foreign file, some of which never end."""
    other = rewrite(adapter, tmp_path / "other", rank_pattern={pattern: 2})
    with pytest.raises(CheckpointError, match="rank_pattern has patterns that can match in too many ways"):
        omni.load(pair.model.folder, adapter=other, device="cpu")


@pytest.mark.parametrize(
    "pattern",
    [
        r"q_proj",
        r"layers\.0\.self_attn\.(q|k|v)_proj",
        r".*layers.*self_attn.*q_proj",
        r"^(?:model\.)?(?:language_model\.)?layers\.\d+\.self_attn\.[qk]_proj",
    ],
)
def test_patterns_that_people_write_are_followed(pair: Pair, adapter: Path, tmp_path: Path, pattern: str) -> None:
    """Protects: the bound on hostile patterns leaves the others alone, an alpha of nothing adds nothing."""
    other = rewrite(adapter, tmp_path / "other", alpha_pattern={pattern: 0})
    expected, got = pair.model, omni.load(pair.model.folder, adapter=other, device="cpu", dtype=torch.float32)
    name = "layers.0.attention.qkv.weight"
    torch.testing.assert_close(parameters(got)[name], parameters(expected)[name], atol=0, rtol=0)


def test_tensors_that_do_not_fit_are_all_listed(pair: Pair, adapter: Path, tmp_path: Path) -> None:
    other = rewrite(adapter, tmp_path / "other")
    tensors = load_file(adapter / "adapter_model.safetensors")
    query = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[query] = torch.ones(4, 3)
    vision = next(name for name in tensors if "blocks.0" in name and "lora_B" in name)
    del tensors[vision]
    prefix = "base_model.model.model"
    tensors |= {f"{prefix}.layers.9.self_attn.q_proj.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"}
    tensors |= {f"{prefix}.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(4)}
    tensors |= {f"{prefix}.embed_tokens.lora_embedding_A": torch.ones(4, 4), "lm_head.weight": torch.ones(2, 2)}
    tensors |= {
        f"base_model.model.talker.model.layers.0.mlp.up_proj.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"
    }
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit or is not supported") as error:
        omni.load(pair.model.folder, adapter=other, device="cpu")
    message = str(error.value)
    for words in (
        "q_proj.lora_magnitude_vector' is not one of a plain LoRA's factors.",
        "embed_tokens.lora_embedding_A' is not one of a plain LoRA's factors.",
        "'lm_head.weight' is not one of a plain LoRA's factors.",
        "'model.layers.9.self_attn.q_proj' is no module whose weight this checkpoint holds by itself.",
        "'model.audio_tower.layers.0.self_attn.q_proj' has factors of (32, 4) and (4, 3), for a weight of (32, 32).",
        "has no lora_B.",
    ):
        assert words in message, message
    assert "talker" not in message
    assert len(message.splitlines()) == 7


def test_a_tied_head_is_not_adapted(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Protects: what would change the embedding along is refused, not guessed."""
    pair = make_pair("qwen2_5", seed=32, text={"tie_word_embeddings": True})
    assert pair.model.thinker.head is None
    shapes = {"A": torch.ones(4, 64), "B": torch.ones(640, 4)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.lm_head.lora_{kind}.weight": tensor for kind, tensor in shapes.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="'lm_head' is no module whose weight this checkpoint holds by itself"):
        omni.load(pair.model.folder, adapter=tmp_path / "adapter", device="cpu")


def test_files_that_are_missing_or_foreign(pair: Pair, adapter: Path, tmp_path: Path) -> None:
    """Protects: pickles are not read, half an adapter is one sentence, and an adapter is no checkpoint."""
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is absent, adapter_model.bin is not read"):
        omni.load(pair.model.folder, adapter=pickled, device="cpu")
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config\.json is not there"):
        omni.load(pair.model.folder, adapter=pair.model.folder, device="cpu")
    with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
        omni.load(pair.model.folder, adapter=tmp_path / "nowhere", device="cpu")
    short = tmp_path / "short"
    shutil.copytree(adapter, short)
    (short / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged or not supported"):
        omni.load(pair.model.folder, adapter=short, device="cpu")


def test_an_adapter_given_as_the_checkpoint_names_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = rewrite(adapter, tmp_path / "other", base_model_name_or_path="Qwen/Qwen2.5-Omni-7B")
    assert main(["--model", str(other), "--device", "cpu", "What is it?"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"omni-generate: {other} is an adapter for 'Qwen/Qwen2.5-Omni-7B', no checkpoint: load that, with this as its "
        "adapter (omni.load(base, adapter=...), --adapter)."
    ]
    (other / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "vision_start_token_id": 1}))
    assert main(["--model", str(other), "--device", "cpu", "What is it?"]) == 1
    assert "It holds an adapter: load its base, with this as the adapter." in capsys.readouterr().err


def test_the_command_line_takes_an_adapter(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects: --adapter reaches the weights: a head that prefers one token answers with it."""
    (tmp_path / "adapter").mkdir()
    config = json.loads((checkpoint / "config.json").read_text())["thinker_config"]["text_config"]
    left = torch.zeros(config["vocab_size"], 1)
    left[40] = 1e4
    factors = {"A": torch.ones(1, config["hidden_size"]), "B": left}
    save_file(
        {f"base_model.model.thinker.lm_head.lora_{kind}.weight": tensor for kind, tensor in factors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "x"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    answers = []
    for options in ([], ["--adapter", str(tmp_path / "adapter")]):
        command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "3", "--json", *options, "Why?"]
        assert main(command) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] != answers[1]
