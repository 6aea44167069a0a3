import json
import re
from pathlib import Path

import pytest
from hub import COMMIT, Hub, ask

from weights import CheckpointError, locate
from weights.source import _reason

THINKER = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
WEIGHT_MAP = {
    "thinker.a": THINKER[0],
    "thinker.b": THINKER[1],
    "talker.x": THINKER[1],
    "talker.y": "model-00003-of-00003.safetensors",
    "token2wav.z": "model-00003-of-00003.safetensors",
}
SMALL = ["config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json"]
SMALL += ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
OTHERS = ["README.md", "spk_dict.pt", "pytorch_model.bin", "modeling.py", "model-00003-of-00003.safetensors"]
OTHERS += ["onnx/config.json", "onnx/model.safetensors", "LICENSE", ".gitattributes"]


def index(weight_map) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


REPOSITORIES = {
    "acme/omni": {name: name.encode() for name in [*SMALL, *THINKER, *OTHERS]}
    | {"model.safetensors.index.json": index(WEIGHT_MAP)},
    "acme/single": {name: name.encode() for name in ("config.json", "model.safetensors", "spk_dict.pt")},
    "acme/both": {name: name.encode() for name in ("config.json", "model.safetensors", *THINKER)}
    | {"model.safetensors.index.json": index(WEIGHT_MAP)},
    "acme/no-weights": {"config.json": b"{}", "pytorch_model.bin": b""},
    "acme/no-thinker": {"model.safetensors.index.json": index({"model.x": "model.safetensors"})},
    "acme/pattern": {"model.safetensors.index.json": index({"thinker.x": "*"}), "modeling.py": b""},
    "acme/gated": {"config.json": b"{}"},
}


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """A cache filled from the stand-in hub: (cache, source → answer, hub)."""
    cache = tmp_path_factory.mktemp("cache")
    hub = Hub(REPOSITORIES, gated=frozenset({"acme/gated"}))
    requests = [(name, None) for name in (*REPOSITORIES, "acme/omni", "acme/unknown")]
    requests += [("acme/omni", "v1"), ("acme/omni", "v9"), ("acme/omni.git", None)]
    answers = ask(cache, hub.address, *requests)
    hub.close()
    return cache, dict(zip(requests, answers, strict=True)), hub


def test_only_what_the_thinker_needs_is_fetched(online) -> None:
    """Protects: no talker or vocoder shard, pickle or code crosses the network, and nothing twice."""
    cache, answers, hub = online
    served = [file for repo_id, file in hub.served if repo_id == "acme/omni"]
    assert sorted(served) == sorted([*SMALL, *THINKER])
    folder = Path(answers["acme/omni", None])
    assert folder == cache / "models--acme--omni" / "snapshots" / COMMIT
    assert folder == Path(answers["acme/omni", "v1"])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SMALL, *THINKER])
    assert (folder / THINKER[1]).read_bytes() == THINKER[1].encode()


def test_a_single_file_without_index_is_fetched(online) -> None:
    """Protects: small checkpoints have no index."""
    _, answers, hub = online
    assert Path(answers["acme/single", None]).is_dir()
    assert sorted(file for repo_id, file in hub.served if repo_id == "acme/single") == [
        "config.json",
        "model.safetensors",
    ]


def test_a_single_file_goes_before_an_index(online) -> None:
    """Protects: where a repository has both, what transformers reads is fetched, and nothing else."""
    _, answers, hub = online
    served = sorted(file for repo_id, file in hub.served if repo_id == "acme/both")
    assert served == ["config.json", "model.safetensors", "model.safetensors.index.json"]
    assert (Path(answers["acme/both", None]) / "model.safetensors").is_file()


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    """Protects: a file of a half-copied folder does not count as absent, which another template would stand in for."""
    (tmp_path / "chat_template.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"chat_template\.json is a link that leads nowhere"):
        locate(tmp_path)


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", None, 5, ""])
def test_what_names_nothing_is_refused(source) -> None:
    with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
        locate(source)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (("acme/unknown", None), "neither an existing folder nor a repository that the hub shows you"),
        (("acme/omni", "v9"), "acme/omni has no revision 'v9'"),
        (("acme/gated", None), "acme/gated is gated: ask for access"),
        (("acme/omni.git", None), "neither an existing folder nor a valid hub id"),
        (
            ("acme/no-weights", None),
            "holds no weights, or they could not be fetched. Not read: pytorch_model.bin; pickles",
        ),
        (("acme/no-thinker", None), "names no tensor that starts with 'thinker.', nor those of a thinker alone"),
        (("acme/pattern", None), "names files that are no safetensors files of its own folder"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(online, request_, says) -> None:
    """Protects: each refusal says what to do, in our error, from the real library's own exceptions."""
    _, answers, hub = online
    assert answers[request_].startswith("CheckpointError: ")
    assert says in answers[request_]
    assert ("acme/pattern", "modeling.py") not in hub.served


def test_offline_takes_the_cache(online) -> None:
    """Protects: HF_HUB_OFFLINE=1 works with what was fetched, and says what to do about what was not."""
    cache, answers, hub = online
    names = [("acme/omni", None), ("acme/omni", COMMIT), ("acme/single", None), ("acme/unknown", None)]
    got = ask(cache, hub.address, *names, ("acme/omni", "v9"), HF_HUB_OFFLINE="1")
    assert got[:3] == [answers["acme/omni", None]] * 2 + [answers["acme/single", None]]
    assert got[3] == (
        "CheckpointError: acme/unknown is not wholly in the hub's cache (the default revision) and HF_HUB_OFFLINE "
        "is set: unset it once to fetch it."
    )
    assert "(revision 'v9') and HF_HUB_OFFLINE is set" in got[4]


def test_offline_with_a_cache_made_by_hand(tmp_path) -> None:
    """Protects: the cache's layout alone is enough, and an interrupted download is no checkpoint."""
    files = {"config.json": b"{}", "model.safetensors.index.json": index(WEIGHT_MAP), THINKER[0]: b"x"}
    for name, held in {"whole": {**files, THINKER[1]: b"y"}, "half": files}.items():
        home = tmp_path / f"models--acme--{name}"
        for folder in (home / "snapshots" / COMMIT, home / "blobs", home / "refs"):
            folder.mkdir(parents=True)
        (home / "refs" / "main").write_text(COMMIT)
        for number, (file, content) in enumerate(held.items()):
            (home / "blobs" / str(number)).write_bytes(content)
            (home / "snapshots" / COMMIT / file).symlink_to(f"../../blobs/{number}")
    requests = (("acme/whole", None), ("acme/half", None))
    whole, half = ask(tmp_path, "http://127.0.0.1:9", *requests, HF_HUB_OFFLINE="1")
    assert whole == str(tmp_path / "models--acme--whole" / "snapshots" / COMMIT)
    assert half.startswith("CheckpointError: ")
    assert THINKER[1] in half
    assert THINKER[0] not in half


def test_without_network_the_cache_is_taken(online) -> None:
    """Protects: a hub that cannot be reached costs no fetched checkpoint, and is named for the others."""
    cache, answers, hub = online  # the hub is closed by now
    found, unknown = ask(cache, hub.address, ("acme/omni", None), ("acme/unknown", None))
    assert found == answers["acme/omni", None]
    assert "the hub cannot be reached: check the network" in unknown


def test_other_failures_keep_their_first_line() -> None:
    """Protects: what the HTTP client or the disk says reaches the user, without its details."""
    assert _reason(OSError("No space left\nmore"), None) == "could not be fetched, try again (OSError: No space left)"
    assert _reason(TimeoutError(), None) == "could not be fetched, try again (TimeoutError: )"


def test_a_failure_of_the_hub_library_is_a_checkpoint_error(monkeypatch) -> None:
    """Protects: no exception of the hub library or its HTTP client passes through."""
    import huggingface_hub

    def broken(*_args, **_kwargs):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match=re.escape("acme/omni could not be fetched")):
        locate("acme/omni")


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch) -> None:
    """Protects: local folders go nowhere near the hub, even where their name looks like an id."""
    monkeypatch.chdir(tmp_path)
    Path("acme/omni").mkdir(parents=True)
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path
    assert locate("acme/omni") == Path("acme/omni")
    with pytest.raises(CheckpointError, match="has no revision 'main': leave it out"):
        locate(tmp_path, revision="main")


@pytest.mark.parametrize("source", ["", "omni", "./acme/omni", "/no/such", "a/b/c", "acme/", "acme/o mni", "~/omni"])
def test_what_is_neither_folder_nor_id_is_refused(tmp_path, monkeypatch, source) -> None:
    """Protects: a mistyped path is not sent to the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"{source!r} is neither an existing folder nor a hub id")):
        locate(source)


def test_a_path_object_is_never_an_id(tmp_path, monkeypatch) -> None:
    """Protects: `Path("acme/omni")` means a folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither an existing folder"):
        locate(Path("acme/omni"))
