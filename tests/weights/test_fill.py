import json

import pytest
import torch
from torch import nn

import weights.load
from weights import CheckpointError, Destination, clear, fill, save_sharded


class Small(nn.Module):
    """A whole parameter, one fused by rows, one stacked, one stacked of fused, a scalar and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.empty(5, 3))
        self.inner = nn.Linear(4, 6)
        self.stacked = nn.Parameter(torch.empty(3, 4, 2), requires_grad=False)
        self.experts = nn.Parameter(torch.empty(2, 4, 3))
        self.scale = nn.Parameter(torch.empty(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))


DESTINATIONS = {
    "thinker.whole": Destination("whole"),
    "thinker.q": Destination("inner.weight", slice(0, 2)),
    "thinker.k": Destination("inner.weight", slice(2, 3)),
    "thinker.v": Destination("inner.weight", slice(3, 6)),
    "thinker.bias": Destination("inner.bias"),
    **{f"thinker.stacked.{index}": Destination("stacked", entry=index) for index in range(3)},
    **{f"thinker.experts.{index}.up": Destination("experts", slice(0, 1), entry=index) for index in range(2)},
    **{f"thinker.experts.{index}.down": Destination("experts", slice(1, 4), entry=index) for index in range(2)},
    "thinker.scale": Destination("scale"),
    "thinker.nothing": Destination("nothing"),
}


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def random_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parameters = dict(on_meta().named_parameters())
    return {
        name: torch.randn(destination.view(parameters[destination.parameter]).shape).to(dtype)
        for name, destination in DESTINATIONS.items()
    }


def refusal(folder, destinations=DESTINATIONS, **options) -> str:
    """The error's text; the module must still be untouched."""
    module = on_meta()
    with pytest.raises(CheckpointError) as caught:
        fill(module, folder, destinations, device="cpu", dtype=torch.float32, **options)
    assert all(parameter.is_meta for parameter in module.parameters())
    return str(caught.value)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("piece_bytes", [8, 16 << 20])
def test_round_trip(tmp_path, monkeypatch, stored, wanted, piece_bytes) -> None:
    """Protects: every kind of destination gets its tensor, bit for bit, in any dtype, shard or piece size."""
    monkeypatch.setattr(weights.load, "PIECE_BYTES", piece_bytes)
    tensors = random_tensors(stored)
    save_sharded(tensors, tmp_path, max_shard_bytes=60)
    module = on_meta()
    fill(module, tmp_path, DESTINATIONS, device="cpu", dtype=wanted)
    parameters = dict(module.named_parameters())
    for name, destination in DESTINATIONS.items():
        filled = destination.view(parameters[destination.parameter])
        assert filled.dtype == wanted
        assert torch.equal(filled, tensors[name].to(wanted)), name
    assert isinstance(parameters["whole"], nn.Parameter)
    assert parameters["whole"].requires_grad
    assert not parameters["stacked"].requires_grad


def test_pieces_across_pages_and_odd_offsets(tmp_path, monkeypatch) -> None:
    """Protects: tensors that begin at any byte of a page, in pieces that divide nothing."""
    monkeypatch.setattr(weights.load, "PIECE_BYTES", 5000)
    values = torch.randn(3, 7001).bfloat16()
    raw = values.view(torch.uint8).numpy().tobytes()
    for padding in (0, 1, 4093):
        entries = {"thinker.x": {"dtype": "BF16", "shape": [3, 7001], "data_offsets": [0, len(raw)]}}
        header = json.dumps(entries).encode() + b" " * padding
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
        with torch.device("meta"):
            module = nn.ParameterDict({"x": nn.Parameter(torch.empty(3, 7001))})
        fill(module, tmp_path, {"thinker.x": Destination("x")}, device="cpu", dtype=torch.float32)
        assert torch.equal(module["x"], values.float())


def test_all_that_does_not_fit_is_in_one_error(tmp_path) -> None:
    """Protects: names, files, both shapes and counts are there, whatever else is wrong."""
    tensors = random_tensors(torch.bfloat16)
    tensors["thinker.k"] = torch.ones(1, 5)
    tensors["thinker.stacked.1"] = torch.ones(2, 4)  # as many elements
    del tensors["thinker.bias"], tensors["thinker.v"]
    tensors["thinker.extra"] = tensors["talker.extra"] = torch.ones(1)
    save_sharded(tensors, tmp_path, max_shard_bytes=10_000)
    destinations = {name: value for name, value in DESTINATIONS.items() if name != "thinker.experts.1.up"}
    lines = refusal(tmp_path, destinations).splitlines()
    shard = "model-00001-of-00001.safetensors"
    assert "(2 missing, 2 unexpected, 2 misshapen, 1 not filled once)" in lines[0]
    assert str(tmp_path) in lines[0]
    assert sorted(lines[1:]) == [
        f"  misshapen: 'thinker.k' in {shard} is (1, 5), the model takes (1, 4)",
        f"  misshapen: 'thinker.stacked.1' in {shard} is (2, 4), the model takes (4, 2)",
        "  missing: 'thinker.bias', for inner.bias",
        "  missing: 'thinker.v', for inner.weight",
        "  not filled once: experts, elements 12 to 15",
        f"  unexpected: 'thinker.experts.1.up' in {shard}",
        f"  unexpected: 'thinker.extra' in {shard}",
    ]


def test_rows_filled_twice_or_never_are_found(tmp_path) -> None:
    """Protects: no part of a parameter keeps uninitialised memory or depends on the order of tensors."""
    tensors = random_tensors(torch.float32)
    tensors["thinker.k"] = torch.ones(2, 4)
    tensors["thinker.v"] = torch.ones(2, 4)
    save_sharded(tensors, tmp_path, max_shard_bytes=10_000)
    overlapping = {"thinker.k": Destination("inner.weight", slice(1, 3)), "thinker.v": DESTINATIONS["thinker.v"]}
    message = refusal(tmp_path, DESTINATIONS | overlapping)
    assert "not filled once: inner.weight, elements 4 to 8" in message
    short = {
        "thinker.k": Destination("inner.weight", slice(2, 4)),
        "thinker.v": Destination("inner.weight", slice(4, 7)),  # one row beyond the end
    }
    save_sharded(tensors | {"thinker.v": torch.ones(3, 4)}, tmp_path, max_shard_bytes=10_000)
    assert "'thinker.v' in model-00001-of-00001.safetensors is (3, 4), the model takes (2, 4)" in refusal(
        tmp_path, DESTINATIONS | short
    )


def test_ignored_names_may_be_there(tmp_path) -> None:
    """Protects: a name the caller has no use for is passed over, and only that name."""
    tensors = random_tensors(torch.float32) | {"thinker.rope.inv_freq": torch.ones(2)}
    save_sharded(tensors, tmp_path, max_shard_bytes=10_000)
    assert "unexpected: 'thinker.rope.inv_freq'" in refusal(tmp_path)
    fill(on_meta(), tmp_path, DESTINATIONS, device="cpu", dtype=torch.float32, ignored={"thinker.rope.inv_freq"})


def test_progress_goes_to_stderr_when_asked_for(tmp_path, capsys) -> None:
    """Protects: a library call is silent unless told otherwise, and stdout stays the answer's."""
    save_sharded(random_tensors(torch.float32), tmp_path, max_shard_bytes=100)
    for progress in (False, True):
        fill(on_meta(), tmp_path, DESTINATIONS, device="cpu", dtype=torch.float32, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Loading weights" in err) == progress


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32], ids=str)
def test_on_the_gpu(tmp_path, monkeypatch, wanted) -> None:
    """Protects: pieces are on the device, converted, before their pages are unmapped."""
    monkeypatch.setattr(weights.load, "PIECE_BYTES", 16)
    tensors = random_tensors(torch.bfloat16)
    save_sharded(tensors, tmp_path, max_shard_bytes=60)
    module = on_meta()
    fill(module, tmp_path, DESTINATIONS, device="cuda", dtype=wanted)
    for name, destination in DESTINATIONS.items():
        filled = destination.view(module.get_parameter(destination.parameter))
        assert filled.is_cuda
        assert torch.equal(filled.cpu(), tensors[name].to(wanted)), name


def test_longer_side_of_a_matrix_is_contiguous(tmp_path) -> None:
    """Where asked for; values and shapes do not depend on it."""
    tensors = random_tensors(torch.float32)
    save_sharded(tensors, tmp_path, max_shard_bytes=1 << 20)
    module = on_meta()
    fill(module, tmp_path, DESTINATIONS, device="cpu", dtype=torch.float32)
    assert module.whole.is_contiguous()
    module = on_meta()
    fill(module, tmp_path, DESTINATIONS, device="cpu", dtype=torch.float32, transposed=True)
    assert module.whole.shape == (5, 3)
    assert module.whole.stride() == (1, 5)
    assert module.stacked.is_contiguous()
    assert torch.equal(module.whole, tensors["thinker.whole"])
    fused = [tensors[f"thinker.{name}"] for name in "qkv"]
    assert module.inner.weight.stride() == (1, 6)
    assert torch.equal(module.inner.weight, torch.cat(fused))


PADDED = {
    "thinker.gate": Destination("up.weight", slice(0, 4), zeros=(1, 0)),
    "thinker.up": Destination("up.weight", slice(4, 8), zeros=(1, 0)),
    "thinker.bias": Destination("up.bias", zeros=(2, 0)),
    "thinker.down": Destination("down", zeros=(0, 3)),
    "thinker.expert.0": Destination("experts", entry=0, zeros=(1, 2)),
    "thinker.expert.1": Destination("experts", entry=1, zeros=(1, 2)),
}


def padded_on_meta() -> nn.Module:
    with torch.device("meta"):
        module = nn.ParameterDict({"down": torch.empty(3, 8), "experts": torch.empty(2, 3, 5)})
        module.up = nn.Linear(6, 8)
    return module


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_wider_than_their_tensors_are_zero_beyond_them(tmp_path, monkeypatch, transposed) -> None:
    """Protects: public tensors keep their shapes, and what is memory alone adds nothing to a product."""
    monkeypatch.setattr(weights.load, "PIECE_BYTES", 30)
    empty = dict(padded_on_meta().named_parameters())
    tensors = {name: torch.randn(place.view(empty[place.parameter]).shape) for name, place in PADDED.items()}
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    assert shapes == [(3, 6), (3, 6), (6,), (3, 5), (2, 3), (2, 3)]
    save_sharded(tensors, tmp_path, max_shard_bytes=1 << 20)
    module = padded_on_meta()
    fill(module, tmp_path, PADDED, device="cpu", dtype=torch.float32, transposed=transposed)
    parameters = dict(module.named_parameters())
    for name, place in PADDED.items():
        assert torch.equal(place.view(parameters[place.parameter]), tensors[name]), name
    written = sum(int((parameter != 0).sum()) for parameter in parameters.values())
    assert written == sum(tensor.numel() for tensor in tensors.values())
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    for name, place in PADDED.items():
        place.with_zeros(parameters[place.parameter].data).fill_(7)
        place.view(parameters[place.parameter].data).copy_(tensors[name])
    clear(module, PADDED)
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


def test_zeros_that_no_tensor_owns_are_found(tmp_path) -> None:
    """Protects: padding is stated, not guessed from what is left over."""
    empty = dict(padded_on_meta().named_parameters())
    tensors = {name: torch.randn(place.view(empty[place.parameter]).shape) for name, place in PADDED.items()}
    save_sharded(tensors, tmp_path, max_shard_bytes=1 << 20)
    unstated = PADDED | {"thinker.up": Destination("up.weight", slice(4, 7))}
    with pytest.raises(CheckpointError, match=r"not filled once: up\.weight, elements 42 to 48"):
        fill(padded_on_meta(), tmp_path, unstated, device="cpu", dtype=torch.float32)
