import json
import os

import pytest
import torch
from safetensors.torch import save_file
from shards import INDEX, entry, shard, write_index

from weights import CheckpointError, read_index
from weights.checkpoint import read_names

SOUND = {"thinker.a": entry(0, 8, [2, 2]), "thinker.b": entry(8, 12, [2])}


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    return str(caught.value)


def single(folder, content: bytes) -> str:
    (folder / "model.safetensors").write_bytes(content)
    return refusal(folder)


def test_tables_name_dtype_shape_and_place(tmp_path) -> None:
    """Protects: what the library writes is found where it says, names outside the prefix left out."""
    tensors = {
        "thinker.a": torch.randn(3, 5).bfloat16(),
        "thinker.b": torch.randn(7),
        "thinker.c": torch.randn(2, 2, 2).half(),
        "thinker.empty": torch.empty(0, 4),
        "talker.x": torch.zeros(4, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    stored = read_index(tmp_path)
    assert stored.keys() == {name for name in tensors if name.startswith("thinker.")}
    for name, found in stored.items():
        assert (found.dtype, found.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        raw = content[found.offset : found.offset + found.num_bytes]
        assert raw == tensors[name].view(torch.uint8).numpy().tobytes()


def test_only_shards_of_the_prefix_are_opened(tmp_path) -> None:
    """Protects: a folder fetched without the talker's shards is whole."""
    (tmp_path / "model-1.safetensors").write_bytes(shard(SOUND, bytes(12)))
    write_index(tmp_path, dict.fromkeys(SOUND, "model-1.safetensors") | {"talker.x": "model-2.safetensors"})
    assert read_index(tmp_path).keys() == SOUND.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut short or no safetensors file: 0 bytes"),
        (b"abc", "cut short or no safetensors file: 3 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", f"header of {2**63}"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (shard(b"{nonsense", b""), "unreadable header: it is not JSON"),
        (shard(b"\xff{}", b""), "unreadable header: it is not UTF-8"),
        (shard(b"[]", b""), "unreadable header: it is not a JSON object"),
        (shard(b"[" * 100_000, b""), "unreadable header: it is nested too deeply"),
        (shard(b'{"thinker.a": 1, "thinker.a": 2}', b""), "unreadable header: a name occurs twice"),
        (shard(b'{"thinker.a": ' + b"9" * 5000 + b"}", b""), "unreadable header: "),
        (shard(SOUND, bytes(11)), "is cut short: 11 bytes of tensors where its header lists 12"),
        (shard(SOUND, bytes(13)), "has 1 bytes after its last tensor"),
        (shard(SOUND | {"thinker.b": entry(6, 12, [3])}, bytes(12)), "'thinker.b' overlaps"),
        (shard(SOUND | {"thinker.b": entry(10, 14, [2])}, bytes(14)), "'thinker.b' leaves a gap"),
        (shard(SOUND | {"talker.x": entry(0, 12, [6])}, bytes(12)), "overlaps"),
        (shard(SOUND | {"thinker.b": entry(8, 12, [3])}, bytes(12)), "'thinker.b' has shape (3,) in BF16, but 4 bytes"),
        (shard({"thinker.a": entry(0, 4, [4], "F8_E4M3")}, bytes(4)), "'F8_E4M3': only BF16, F16, F32"),
        (shard({"thinker.a": entry(0, 4, [4], "I8")}, bytes(4)), "quantised checkpoints are not"),
        (shard({"thinker.a": entry(0, 4, [4], "X" * 10_000)}, bytes(4)), "XXXX"),
        (shard({"thinker.a": entry(-4, 0, [2])}, b""), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": entry(4, 0, [2])}, bytes(4)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": entry(0, 4, [-2, -1])}, bytes(4)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": entry(0, 2, [True])}, bytes(2)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": entry(0, 2, [1.0])}, bytes(2)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": entry(0, 2, [1] * 9)}, bytes(2)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": {"dtype": "BF16", "shape": [1]}}, bytes(2)), "no sound dtype, shape and data_offsets"),
        (shard({"thinker.a": None}, b""), "no sound dtype, shape and data_offsets"),
        (shard({"talker.a": entry(0, 2, [1])}, bytes(2)), "no tensor whose name starts with 'thinker.'"),
    ],
)
def test_a_damaged_file_is_refused_in_words(tmp_path, content: bytes, says: str) -> None:
    """Protects: each kind of damage has its own message, naming the file, never another exception."""
    message = single(tmp_path, content)
    assert says in message
    assert "model.safetensors" in message
    assert all(len(line) < 300 for line in message.splitlines())


def test_everything_wrong_is_in_one_error(tmp_path) -> None:
    """Protects: one run shows every damaged shard, and every damaged tensor in one."""
    (tmp_path / "model-1.safetensors").write_bytes(
        shard({"thinker.a": entry(0, 4, [3]), "thinker.b": entry(4, 8, [4], "I8")}, bytes(8))
    )
    (tmp_path / "model-2.safetensors").write_bytes(shard({"thinker.c": entry(0, 4, [2])}, bytes(2)))
    (tmp_path / "model-4.safetensors").write_bytes(shard({"thinker.e": entry(0, 4, [2])}, bytes(4)))
    places = {"a": 1, "b": 1, "c": 2, "d": 3, "f": 4}
    write_index(tmp_path, {f"thinker.{name}": f"model-{part}.safetensors" for name, part in places.items()})
    message = refusal(tmp_path)
    for says in (
        "model-1.safetensors: 'thinker.a' has shape (3,) in BF16, but 4 bytes.",
        "model-1.safetensors: 'thinker.b' is stored as 'I8'",
        "model-2.safetensors is cut short",
        "model-3.safetensors is absent.",
        "model-4.safetensors holds 'thinker.e', which the index does not place there.",
        "model-4.safetensors lacks 'thinker.f', which the index places there.",
    ):
        assert says in message


def test_a_long_list_is_cut(tmp_path) -> None:
    """Protects: a wholly wrong checkpoint prints a screenful, and says how much it left out."""
    entries = {f"thinker.{index}": entry(2 * index, 2 * index + 2, [5]) for index in range(50)}
    lines = single(tmp_path, shard(entries, bytes(100))).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  … and 30 more."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "it is not JSON"),
        (b"[1]", "it is not a JSON object"),
        (b'{"metadata": {}}', 'it has no "weight_map" object'),
        (b'{"weight_map": ["thinker.a"]}', 'it has no "weight_map" object'),
        (b'{"weight_map": {"talker.a": "x.safetensors"}}', "names no tensor that starts with 'thinker.'"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content: bytes, says: str) -> None:
    """Protects: an index that is no index is an error of its own, not a missing tensor later."""
    (tmp_path / INDEX).write_bytes(content)
    message = refusal(tmp_path)
    assert says in message
    assert INDEX in message


FOREIGN_FILES = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "..", "", "x.bin"]
FOREIGN_FILES += ["*.safetensors", "x\0.safetensors", "\ud800.safetensors", "x.safetensors\n"]


@pytest.mark.parametrize("file", [*FOREIGN_FILES, 3, None, ["x.safetensors"]])
def test_an_index_names_files_of_its_own_folder(tmp_path, file) -> None:
    """Protects: a foreign index opens nothing outside its folder and asks the hub for no pattern."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "x.safetensors").write_bytes(shard({"thinker.a": entry(0, 2, [1])}, bytes(2)))
    write_index(folder, {"thinker.a": file})
    message = refusal(folder)
    assert "names files that are no safetensors files of its own folder" in message
    assert repr(file)[:100] in message
    message.encode()


def test_a_link_may_not_leave_the_folder(tmp_path) -> None:
    """Protects: a foreign checkpoint cannot point at other files of the machine, a neighbour folder's name included."""
    folder, neighbour = tmp_path / "checkpoint", tmp_path / "checkpoint-2"
    folder.mkdir()
    neighbour.mkdir()
    (neighbour / "x").write_bytes(shard(SOUND, bytes(12)))
    (folder / "model.safetensors").symlink_to("../checkpoint-2/x")
    assert "model.safetensors is a link that leaves the folder." in refusal(folder)
    (folder / "inside").write_bytes((neighbour / "x").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("inside")
    assert read_index(folder).keys() == SOUND.keys()


def test_the_hub_cache_links_to_its_blobs(tmp_path) -> None:
    """Protects: snapshots of the hub's cache load, also through a link to the snapshot; their neighbours do not."""
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123"
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "beef").write_bytes(shard(SOUND, bytes(12)))
    (snapshot / "model.safetensors").symlink_to("../../blobs/beef")
    (tmp_path / "alias").symlink_to(snapshot)
    assert read_index(snapshot).keys() == read_index(tmp_path / "alias").keys() == SOUND.keys()
    (tmp_path / "models--o--n" / "refs").mkdir()
    (blobs / "beef").rename(tmp_path / "models--o--n" / "refs" / "beef")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../refs/beef")
    assert "is a link that leaves the folder" in refusal(snapshot)


def test_a_folder_without_weights_says_so(tmp_path) -> None:
    """Protects: the error names the two files looked for."""
    message = refusal(tmp_path)
    assert INDEX in message
    assert "nor model.safetensors" in message


def test_links_in_a_circle_and_pipes_are_absent_files(tmp_path) -> None:
    """Protects: no endless walk and no wait for a writer."""
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    os.mkfifo(tmp_path / "c.safetensors")
    write_index(tmp_path, {f"thinker.{name}": f"{name}.safetensors" for name in "ac"})
    message = refusal(tmp_path)
    assert "a.safetensors is absent." in message
    assert "c.safetensors is absent." in message


def test_an_unreadable_shard_is_listed(tmp_path, monkeypatch) -> None:
    """Protects: the system's own refusal is one more line of the list."""
    (tmp_path / "model.safetensors").write_bytes(shard(SOUND, bytes(12)))

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert "model.safetensors cannot be read: Permission denied." in refusal(tmp_path)


def test_an_index_too_long_to_be_one_is_not_read(tmp_path) -> None:
    """Protects: reading is bounded before it starts."""
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(200_000_000)
    assert "it is longer than" in refusal(tmp_path)


def test_the_error_is_a_value_error(tmp_path) -> None:
    """Protects: callers may catch either name."""
    assert issubclass(CheckpointError, ValueError)


def test_a_single_file_goes_before_an_index(tmp_path) -> None:
    """Protects: what `save_pretrained` writes over a sharded checkpoint is read, as by transformers, with a word."""
    (tmp_path / "model.safetensors").write_bytes(shard(SOUND, bytes(12)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"thinker.old": "model-00001-of-00001.safetensors"}}))
    with pytest.warns(UserWarning, match="model.safetensors is read, .* beside it is not"):
        assert read_index(tmp_path).keys() == SOUND.keys()
    assert read_names(tmp_path) == list(SOUND)


def test_files_that_are_not_read_are_named(tmp_path) -> None:
    """Protects: who has pickles alone learns that it is them that are not read."""
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "model.fp16.safetensors"):
        (tmp_path / name).touch()
    assert "Not read: model.fp16.safetensors, pytorch_model-00001" in refusal(tmp_path)


def test_a_download_that_is_not_done_is_refused(tmp_path) -> None:
    """Protects: aria2 makes the file at its full size first, so that what has not come yet would be read as zeros."""
    assert "says model.safetensors.aria2" not in single(tmp_path, shard(SOUND, bytes(11)))
    (tmp_path / "model.safetensors.aria2").touch()
    assert "is not whole: its download goes on, or was interrupted" in single(tmp_path, shard(SOUND, bytes(12)))
