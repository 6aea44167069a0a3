"""What cannot run is said before the first shard is fetched: a stand-in hub counts the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, run

from tests.processes import python

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def repository(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, bytes]:
    """The files of a checkpoint, its config changed."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    if change is not None:
        config = json.loads(files["config.json"])
        change(config)
        files["config.json"] = json.dumps(config).encode()
    return files


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    """The index without some tensors."""
    index = json.loads(files[INDEX])
    for name in names:
        del index["weight_map"][name]
    return {**files, INDEX: json.dumps(index).encode()}


def huge(config: dict[str, Any]) -> None:
    """More than this machine has, within what a model might have."""
    text = config["thinker_config"]["text_config"]
    text |= {"vocab_size": 2**24, "max_position_embeddings": 2048}
    text |= {"num_hidden_layers": 256, "intermediate_size": 2**20}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    sound = tmp_path_factory.mktemp("random") / "checkpoint"
    python("scripts/make_checkpoint.py", sound, check=True)
    files = repository(sound)
    missing = without(files, "thinker.model.norm.weight", "thinker.visual.merger.mlp.0.bias")
    single = {name: content for name, content in files.items() if name != INDEX and not name.endswith(".safetensors")}
    header = json.dumps({"thinker.visual.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    one_file = len(header).to_bytes(8, "little") + header + bytes(4)
    quantised: dict[str, Any] = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    words = {name: content for name, content in files.items() if name not in ("vocab.json", "merges.txt")}
    unlisted = {name: content for name, content in files.items() if name != "tokenizer_config.json"}
    beside = {"adapter_config.json": b"{}"}
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "acme/sound"}
    hub = Hub(
        {
            "acme/sound": files,
            "acme/unknown": repository(sound, lambda config: config.update(architectures=["LlamaForCausalLM"])),
            "acme/quantised": repository(sound, lambda config: config.update(quantised)),
            "acme/quantised-names": {
                **files,
                INDEX: files[INDEX].replace(b"layers.0.self_attn.q_proj.weight", b"layers.0.self_attn.q_proj.qweight"),
            },
            "acme/huge": repository(sound, huge),
            "acme/missing": missing,
            "acme/one-file": {**single, SINGLE: one_file + bytes(10**6)},
            "acme/no-words": words,
            "acme/no-added-tokens": unlisted,
            "acme/template": {**files, "chat_template.json": b'{"chat_template": "{% if %}"}'},
            "acme/adapter-beside": {**files, **beside},
            "acme/adapter": {"adapter_config.json": json.dumps(adapter).encode(), "adapter_model.safetensors": b"x"},
        }
    )
    yield hub
    hub.close()


def ask(hub: Hub, cache: Path, name: str, *options: str) -> tuple[int, str, dict[str, int]]:
    """Exit status and stderr of the command line, and the bytes of safetensors files that were sent for it."""
    words = ["-m", "omni.generate", "--model", name, "--device", "cpu", *options]
    done = run(cache, hub.address, *words, "--max-new-tokens", "1", "What is it?")
    sent = {file: count for (repo, file), count in hub.sent.items() if repo == name and file.endswith(".safetensors")}
    return done.returncode, done.stderr, sent


REFUSED = {
    "acme/unknown": "describes LlamaForCausalLM; supported: ",
    "acme/quantised": "config.json.quantization_config: quantised weights (method 'awq') are not supported",
    "acme/quantised-names": "(2 missing, 2 unexpected; quantised weights are not supported)",
    "acme/huge": "GB in float32, and cpu can hold ",
    "acme/missing": "does not fit the model (2 missing):",
    "acme/no-words": "holds no tokenizer: it needs vocab.json and merges.txt, or tokenizer.json",
    "acme/no-added-tokens": "the tokenizer lists no added token <|im_start|>, <|im_end|>, ",
    "acme/template": "the chat template failed: TemplateSyntaxError: Expected an expression",
    "acme/adapter-beside": "holds adapter_config.json beside its weights: give the folder as the adapter, too, or",
    "acme/adapter": "is an adapter for 'acme/sound', no checkpoint: load that, with this as its adapter",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_shard_is_asked_for(hub: Hub, tmp_path: Path, name: str) -> None:
    """Protects: nobody waits for gigabytes to learn that they are of no use. One sentence, no traceback."""
    status, err, sent = ask(hub, tmp_path / "cache", name)
    assert status == 1
    assert REFUSED[name] in err
    assert "Traceback" not in err
    assert sent == {}
    if name == "acme/missing":
        assert "missing: 'thinker.model.norm.weight', for norm.weight" in err
        assert "missing: 'thinker.visual.merger.mlp.0.bias', for vision.merger.hidden.bias" in err


def test_one_file_is_judged_by_its_first_bytes(hub: Hub, tmp_path: Path) -> None:
    """Protects: transformers 5 saves up to 50 GB as one file, whose header names its tensors."""
    status, err, sent = ask(hub, tmp_path / "cache", "acme/one-file")
    assert status == 1
    assert "missing, 1 unexpected):" in err
    assert sent[SINGLE] <= 100_001


def test_what_is_fetched_is_said(hub: Hub, tmp_path: Path) -> None:
    """Protects: how much is coming, before it comes; a second run fetches and says nothing."""
    status, err, sent = ask(hub, tmp_path / "cache", "acme/sound")
    assert status == 0, err
    files = [name for name in hub.repositories["acme/sound"] if name.endswith(".safetensors")]
    size = sum(len(hub.repositories["acme/sound"][name]) for name in files)
    assert f"fetching {len(files)} files of acme/sound, {size / 1e9:.2f} GB, into " in err
    assert sum(sent.values()) == size
    status, err, again = ask(hub, tmp_path / "cache", "acme/sound")
    assert (status, again) == (0, sent)
    assert "fetching" not in err


def test_an_adapter_is_judged_before_its_base_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """Protects: an adapter from the hub is fetched first, and one that is of no use costs no base."""
    before = hub.sent.copy()
    status, err, _ = ask(hub, tmp_path / "cache", "acme/sound", "--adapter", "acme/adapter")
    assert status == 1
    assert "adapter_model.safetensors is damaged or not supported" in err
    new = [file for _, file in (hub.sent - before) if file.endswith(".safetensors")]
    assert new == ["adapter_model.safetensors"]


def test_sampling_that_is_not_named_is_refused_first(hub: Hub, tmp_path: Path) -> None:
    """Protects: `--temperature checkpoint` of one that names no sampling costs no weights."""
    status, err, _ = ask(hub, tmp_path / "cache", "acme/sound", "--temperature", "checkpoint")
    assert status == 1
    assert "names no sampling settings in generation_config.json: give a temperature." in err
    assert "fetching" not in err
