"""Damaged checkpoints: the right tensors or CheckpointError, nothing else, and no memory on a header's word.

The judge of "right" is the safetensors library, to the last bit, or plain slicing of the file's bytes where
the library is stricter about what a thinker does not read: metadata, and tensors under other names.
"""

import json
import tempfile
import tracemalloc
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from shards import shard
from torch import nn

from weights import CheckpointError, Destination, fill

TENSORS = {
    "thinker.a": torch.arange(6).view(2, 3).bfloat16(),
    "thinker.b": torch.arange(4.0),
    "thinker.c": torch.arange(4).half(),
    "talker.d": torch.arange(3),
}
NAMES = [name for name in TENSORS if name.startswith("thinker.")]
SOUND = save(TENSORS, metadata={"format": "pt"})
DATA_START = 8 + int.from_bytes(SOUND[:8], "little")
HEADER = json.loads(SOUND[8:DATA_START])
WEIGHT_MAP = dict.fromkeys(TENSORS, "model-1.safetensors")
TRIES = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def load(folder: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = nn.ParameterDict({name[-1]: nn.Parameter(torch.empty(TENSORS[name].shape)) for name in NAMES})
    destinations = {name: Destination(name[-1]) for name in NAMES}
    fill(module, folder, destinations, device="cpu", dtype=torch.float32)
    return {name: module[name[-1]].detach() for name in NAMES}


def sliced(content: bytes) -> dict[str, torch.Tensor]:
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    tensors = {}
    for name in NAMES:
        begin, end = header[name]["data_offsets"]
        raw = torch.frombuffer(bytearray(content[start + begin : start + end]), dtype=dtypes[header[name]["dtype"]])
        tensors[name] = raw.view(header[name]["shape"])
    return tensors


def right_or_refused(shard_bytes: bytes, index: bytes | None = None) -> bool:
    """Whether it loaded. Fails for another exception, wrong values, or memory out of proportion."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / ("model.safetensors" if index is None else "model-1.safetensors")
        path.write_bytes(shard_bytes)
        if index is not None:
            (folder / "model.safetensors.index.json").write_bytes(index)
        tracemalloc.start()
        try:
            loaded = load(folder)
        except CheckpointError as error:
            str(error).encode()
            return False
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4_000_000, "memory sized by what the file says"
        try:
            judged = load_file(path)
        except SafetensorError:
            judged = sliced(shard_bytes)
        for tensor in NAMES:
            assert torch.equal(loaded[tensor].view(torch.int32), judged[tensor].float().view(torch.int32))
        return True


def test_the_sound_one_loads() -> None:
    """Protects: the tests below, which would pass if nothing ever loaded."""
    assert right_or_refused(SOUND)
    assert right_or_refused(SOUND, json.dumps({"weight_map": WEIGHT_MAP}).encode())


def test_cut_at_every_byte() -> None:
    """Protects: no truncation passes, wherever it falls."""
    for length in range(len(SOUND)):
        assert not right_or_refused(SOUND[:length]), length


@settings(TRIES, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(flips) -> None:
    """Protects: a flip in the header is refused or harmless; one in the data is only a value."""
    damaged = bytearray(SOUND)
    for place, mask in flips:
        damaged[place] ^= mask
    loaded = right_or_refused(bytes(damaged))
    if all(place >= DATA_START for place, _ in flips):
        assert loaded


@settings(TRIES, max_examples=150)
@given(st.one_of(st.integers(0, 2 * len(SOUND)), st.integers(0, 2**64 - 1)), st.integers(0, len(SOUND)))
def test_header_lengths(length, size) -> None:
    """Protects: the first eight bytes are never believed, whatever follows."""
    content = length.to_bytes(8, "little") + SOUND[8:size]
    assert right_or_refused(content) == (content == SOUND)


@settings(TRIES, max_examples=100)
@given(st.binary(max_size=300))
def test_noise(noise) -> None:
    """Protects: any bytes at all, as the file, its header or its index."""
    assert not right_or_refused(noise)
    assert not right_or_refused(shard(noise, SOUND[DATA_START:]))
    assert not right_or_refused(SOUND, noise)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*TENSORS, "BF16", "F16", "F32", "I64", "F8_E4M3", "model-1.safetensors", "../model"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def mutated(draw, value):
    """A JSON value with one to three places replaced, deleted, or copied from another place."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path] or [("x",)]))
        holder = value
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "delete", "copy"]))
        if action == "delete" and last in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[last]
        elif action == "copy":
            source = value
            for key in draw(st.sampled_from(list(places(value)))):
                source = source[key]
            holder[last] = json.loads(json.dumps(source))
        else:
            holder[last] = draw(JSON)
    return value


@settings(TRIES, max_examples=400)
@given(mutated(HEADER))
def test_mutated_headers(header) -> None:
    """Protects: lying dtypes, shapes, offsets and names, of any JSON type."""
    right_or_refused(shard(header, SOUND[DATA_START:]))


@settings(TRIES, max_examples=200)
@given(mutated({"metadata": {}, "weight_map": WEIGHT_MAP}))
def test_mutated_indices(index) -> None:
    """Protects: an index of any shape leads to the shard it may name or to the error."""
    right_or_refused(SOUND, json.dumps(index).encode())


def test_a_shape_of_absurd_sizes_costs_nothing() -> None:
    """Protects: the product of a header's sizes is cheap, and no tensor is made from it."""
    for shape in ([2**62] * 8, [0, 2**200], [10**4000] * 8, [1] * 100_000):
        header = HEADER | {"thinker.a": HEADER["thinker.a"] | {"shape": shape}}
        assert not right_or_refused(shard(header, SOUND[DATA_START:]))
