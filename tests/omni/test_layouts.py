"""The layouts in which people keep fine-tunes: all load to the same parameters, bit for bit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import omni
from tests.omni.pairs import FAMILIES, Pair, make_request
from weights import CheckpointError, save_sharded

REQUEST = [("text", 5), ("image", 6, 8), ("video", 3, 6, 6, 1.0, 420), ("text", 4)]
CLASSES = {"qwen2_5": "Qwen2_5OmniThinker", "qwen3": "Qwen3OmniMoeThinker"}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(request.param, seed=21)


def family_of(pair: Pair) -> str:
    return "qwen3" if pair.model.config.family == "qwen3_omni_moe" else "qwen2_5"


def usual(pair: Pair) -> dict[str, Tensor]:
    """The tensors of the usual layout, by name."""
    tensors: dict[str, Tensor] = {}
    for file in pair.model.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return {name: tensor for name, tensor in tensors.items() if name.startswith("thinker.")}


def config_of(pair: Pair, *, whole: bool) -> dict[str, Any]:
    config = json.loads((pair.model.folder / "config.json").read_text())
    return config if whole else {**config["thinker_config"], "architectures": [thinker_class(pair)]}


def thinker_class(pair: Pair) -> str:
    return f"{CLASSES[family_of(pair)]}ForConditionalGeneration"


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, sharded: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if sharded:
        save_sharded(tensors, folder, max_shard_bytes=100_000)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def deeper(name: str) -> str:
    """As transformers 5 has it in memory."""
    name = re.sub(r"^thinker\.(audio_tower|visual)\.", r"thinker.model.\1.", name)
    return re.sub(r"^thinker\.model\.(?!audio_tower|visual)", "thinker.model.language_model.", name)


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as one tensor each, as transformers 5 has them in memory; of the older family nothing changes."""
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
        else:
            rest[name] = tensor
    for name, parts in experts.items():
        gate, up, down = (torch.stack([parts[kind][i] for i in sorted(parts[kind])]) for kind in ("gate", "up", "down"))
        rest |= {f"{name}.gate_up_proj": torch.cat([gate, up], 1), f"{name}.down_proj": down}
    return rest


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("thinker."): tensor for name, tensor in tensors.items()}


def respelled(tensors: dict[str, Tensor], spell: Callable[[str], str]) -> dict[str, Tensor]:
    return {spell(name): tensor for name, tensor in tensors.items()}


def with_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    extra += ["visual.rotary_pos_emb.inv_freq", "visual.rotary_pos_emb.original_inv_freq"]
    extra += ["audio_tower.positional_embedding.positional_embedding"]
    return tensors | {f"thinker.{name}": torch.ones(3) for name in extra}


LAYOUTS: dict[str, Callable[[Pair, Path], Path]] = {
    "thinker alone, one file": lambda pair, folder: write(folder, config_of(pair, whole=False), bare(usual(pair))),
    "thinker alone, sharded": lambda pair, folder: write(
        folder, config_of(pair, whole=False), bare(usual(pair)), sharded=True
    ),
    "its own config, names of the whole": lambda pair, folder: write(
        folder, config_of(pair, whole=False), usual(pair) | {"talker.model.norm.weight": torch.ones(2)}, sharded=True
    ),
    "the whole config, names of its own": lambda pair, folder: write(
        folder, config_of(pair, whole=True), bare(usual(pair))
    ),
    "transformers 5 in memory, whole": lambda pair, folder: write(
        folder, config_of(pair, whole=True), respelled(fused(usual(pair)), deeper), sharded=True
    ),
    "transformers 5 in memory, alone": lambda pair, folder: write(
        folder, config_of(pair, whole=False), bare(respelled(fused(usual(pair)), deeper))
    ),
    "fused experts alone": lambda pair, folder: write(folder, config_of(pair, whole=True), fused(usual(pair))),
    "deeper names alone": lambda pair, folder: write(
        folder, config_of(pair, whole=True), respelled(usual(pair), deeper)
    ),
    "buffers saved along": lambda pair, folder: write(folder, config_of(pair, whole=True), with_buffers(usual(pair))),
    "buffers saved along, deeper": lambda pair, folder: write(
        folder, config_of(pair, whole=False), bare(respelled(with_buffers(fused(usual(pair))), deeper)), sharded=True
    ),
    "saved by transformers, thinker alone": lambda pair, folder: saved(pair, folder, {}),
    "saved by transformers as in memory": lambda pair, folder: saved(pair, folder, {"save_original_format": False}),
    "saved by transformers, whole, as in memory": lambda pair, folder: saved(
        pair, folder, {"save_original_format": False}, whole=True
    ),
}


def saved(pair: Pair, folder: Path, options: dict[str, Any], *, whole: bool = False) -> Path:
    """Written by the installed transformers from the model that it holds."""
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    reference = pair.reference
    if whole:
        kind = getattr(transformers, thinker_class(pair).replace("Thinker", ""))
        reference = kind(transformers.AutoConfig.from_pretrained(pair.model.folder))
        reference.thinker = pair.reference
    reference.save_pretrained(folder, **options)
    return folder


def same(model: omni.Omni, other: omni.Omni) -> None:
    theirs = dict(other.thinker.named_parameters())
    ours = dict(model.thinker.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_to_the_same_parameters(pair: Pair, tmp_path: Path, name: str) -> None:
    """Protects: bit for bit the parameters of the usual layout, and transformers' logits within 1e-5."""
    folder = LAYOUTS[name](pair, tmp_path / "checkpoint")
    model = omni.load(folder, device="cpu", dtype=torch.float32)
    assert model.config.decoder == pair.model.config.decoder
    assert model.config.token_ids == pair.model.config.token_ids
    same(model, pair.model)
    inputs = make_request(pair, REQUEST)
    torch.testing.assert_close(model.prefill(inputs).logits, pair.reference_logits(inputs), atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def tied(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(request.param, seed=22, text={"tie_word_embeddings": True})


@pytest.mark.parametrize("spell", [str, deeper])
def test_a_head_stored_under_a_tied_config(tied: Pair, tmp_path: Path, spell: Callable[[str], str]) -> None:
    """Protects: equal to the embedding it is dropped, different it is the head; absent the embedding is."""
    tensors = usual(tied)
    embedding = tensors["thinker.model.embed_tokens.weight"]
    assert tied.model.thinker.head is None
    equal = tensors | {"thinker.lm_head.weight": embedding.clone()}
    model = omni.load(
        write(tmp_path / "equal", config_of(tied, whole=True), respelled(equal, spell)), dtype=torch.float32
    )
    same(model, tied.model)
    head = embedding.clone()
    head[-1, -1] += 1
    other = tensors | {"thinker.lm_head.weight": head}
    folder = write(tmp_path / "other", config_of(tied, whole=False), bare(respelled(other, spell)), sharded=True)
    model = omni.load(folder, dtype=torch.float32)
    assert model.thinker.head is not None
    assert torch.equal(model.thinker.head.weight, head.float())
    assert not model.config.decoder.tie_word_embeddings
    inputs = make_request(tied, REQUEST)
    logits = tied.model.prefill(inputs).logits
    got = model.prefill(inputs).logits
    torch.testing.assert_close(got[:-1], logits[:-1], atol=1e-5, rtol=0)
    assert got[-1] != logits[-1]


def test_a_tie_said_by_the_text_config_alone(tied: Pair, tmp_path: Path) -> None:
    """Protects: files of transformers 4, which say it there."""
    config = config_of(tied, whole=True)
    thinker = config["thinker_config"]
    thinker["text_config"]["tie_word_embeddings"] = thinker.pop("tie_word_embeddings")
    model = omni.load(write(tmp_path / "tied", config, usual(tied)), dtype=torch.float32)
    same(model, tied.model)


def problems(error: pytest.ExceptionInfo[CheckpointError]) -> Iterator[str]:
    return (line.strip() for line in str(error.value).splitlines()[1:])


def test_nothing_but_buffers_is_left_out(pair: Pair, tmp_path: Path) -> None:
    """Protects: what is missing or unexpected is listed by the name that the checkpoint uses, all of it."""
    tensors = bare(respelled(fused(usual(pair)), deeper))
    del tensors["model.language_model.norm.weight"], tensors["model.visual.merger.mlp.0.bias"]
    tensors["model.language_model.layers.0.self_attn.rotary_emb.weight"] = torch.ones(1)
    tensors["model.visual.inv_freq"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"does not fit the model \(2 missing, 2 unexpected\)") as error:
        omni.load(write(tmp_path / "checkpoint", config_of(pair, whole=False), tensors))
    assert list(problems(error)) == [
        "missing: 'model.visual.merger.mlp.0.bias', for vision.merger.hidden.bias",
        "missing: 'model.language_model.norm.weight', for norm.weight",
        "unexpected: 'model.language_model.layers.0.self_attn.rotary_emb.weight' in model.safetensors",
        "unexpected: 'model.visual.inv_freq' in model.safetensors",
    ]


def test_quantised_weights_are_called_so(pair: Pair, tmp_path: Path) -> None:
    tensors = usual(pair)
    name = "thinker.model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight_scale"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"\(1 unexpected; quantised weights are not supported\)"):
        omni.load(write(tmp_path / "checkpoint", config_of(pair, whole=True), tensors))


def test_other_models_are_no_thinkers(pair: Pair, tmp_path: Path) -> None:
    """Protects: a text model's tensors under a thinker's config are one sentence, not thousands of names."""
    tensors = {name: tensor for name, tensor in bare(usual(pair)).items() if name.startswith("model.")}
    with pytest.raises(CheckpointError, match=r"model\.safetensors names no tensor that starts with 'thinker\.', nor"):
        omni.load(write(tmp_path / "checkpoint", config_of(pair, whole=True), tensors))
