"""Measures what loading costs: peak host memory above the parameters, against the largest tensor.

    python scripts/stress/measure_load.py

Writes a random bfloat16 checkpoint of more than 2 GB, a Qwen3-Omni thinker of few layers with all of the released
model's 128 experts in each, into a temporary folder. Loads it in a fresh process into float32 and into bfloat16, then
with an adapter of rank 16 on attention, experts and head merged in, and fails where loading took more memory above the
parameters than the largest tensor has in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import weights
from omni.config import OmniConfig, read_config
from omni.model import tensor_names
from omni.thinker import Thinker

sys.path.append(str(Path(__file__).parents[1]))
from make_checkpoint import FAMILIES

MIB = 1 << 20
LAYERS = 2


def make_config() -> OmniConfig:
    """Decoder layers and vocabulary of Qwen3-Omni-30B-A3B, small encoders."""
    tokens = {role: index for index, role in enumerate(FAMILIES["qwen3"].marks)}
    values = FAMILIES["qwen3"].config(tokens, 152064, 2048)
    values["thinker_config"]["text_config"] |= {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_scaling": {"mrope_section": [24, 20, 20]},
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return read_config(Path(folder))


def random_tensors() -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    config = make_config()
    with torch.device("meta"):
        parameters = dict(Thinker(config).named_parameters())
    for name, destination in tensor_names(config).items():
        shape = destination.view(parameters[destination.parameter]).shape
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_()


def write_adapter(folder: Path) -> None:
    """A random LoRA as PEFT saves it beside transformers 5, where the experts of a layer share their factors."""
    decoder, rank = make_config().decoder, 16
    heads, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    hidden, size = decoder.hidden_size, decoder.moe_intermediate_size
    modules = {"lm_head": (decoder.vocab_size, hidden, 1)}
    for layer in range(LAYERS):
        name = f"model.language_model.layers.{layer}"
        modules |= {f"{name}.self_attn.{part}_proj": (keys, hidden, 1) for part in "kv"}
        modules |= {f"{name}.self_attn.q_proj": (heads, hidden, 1), f"{name}.self_attn.o_proj": (hidden, heads, 1)}
        modules[f"{name}.mlp.experts.base_layer"] = (2 * size, hidden, decoder.num_experts)
        modules[f"{name}.mlp.experts"] = (hidden, size, decoder.num_experts)
    tensors = {}
    for name, (outputs, inputs, shared) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank * shared, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank * shared)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_parameters": ["gate_up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def memory() -> dict[str, int]:
    """Bytes of this process from /proc/self/status: VmRSS = RssAnon + RssFile + RssShmem; VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) << 10 for key in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


class Peak(threading.Thread):
    """The most of each kind of memory, sampled every millisecond. The kernel keeps an exact peak of the sum only.

    The peaks of two kinds may come at different times: pages of a shard are mapped while parameters are not all
    filled, so the peaks do not add up to that of the sum.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = memory()
        self.running = True

    def run(self) -> None:
        while self.running:
            for key, value in memory().items():
                self.bytes[key] = max(self.bytes[key], value)
            time.sleep(0.001)


def measure(folder: Path, dtype: torch.dtype, adapter_folder: Path | None) -> bool:
    """Loads in this process and prints the figures; whether the claim holds."""
    config = make_config()
    names = tensor_names(config)
    with torch.device("meta"):
        model = Thinker(config)
    stored = weights.read_index(folder)
    largest = max(tensor.num_bytes for tensor in stored.values())
    total = sum(tensor.num_bytes for tensor in stored.values())
    warm_up = torch.zeros(MIB, dtype=torch.bfloat16).to(dtype, copy=True)  # starts PyTorch's threads
    del warm_up
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = memory()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    adapter = {}
    if adapter_folder is not None:
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(place.view(parameters[place.parameter]).shape) for name, place in names.items()}
        adapter = weights.read_adapter(adapter_folder, weights.Layout(), shapes)
    weights.fill(model, folder, names, adapter=adapter, device="cpu", dtype=dtype)
    seconds = time.perf_counter() - start
    peak.running = False
    peak.join()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    above = memory()["VmHWM"] - before["VmRSS"] - parameters
    anonymous = peak.bytes["RssAnon"] - before["RssAnon"] - parameters
    mapped = peak.bytes["RssFile"] - before["RssFile"]
    holds = max(above, anonymous, mapped) < largest
    print(
        f"{dtype}, {len(adapter)} tensors adapted:",
        f"{total / 1e9:.2f} GB in {len(stored)} tensors, {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)",
        f"parameters                   {parameters / MIB:8.1f} MiB",
        f"largest tensor, in the file  {largest / MIB:8.1f} MiB",
        f"peak above the parameters    {above / MIB:8.1f} MiB  all pages (VmHWM, exact)",
        f"                             {anonymous / MIB:8.1f} MiB  anonymous pages alone (RssAnon, sampled)",
        f"                             {mapped / MIB:8.1f} MiB  pages of files alone (RssFile, sampled)",
        f"peak above the parameters < largest tensor: {'holds' if holds else 'DOES NOT HOLD'}",
        sep="\n  ",
    )
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", metavar=("FOLDER DTYPE", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, dtype, *adapter = options.measure
        sys.exit(not measure(Path(folder), getattr(torch, dtype), Path(adapter[0]) if adapter else None))
    with tempfile.TemporaryDirectory() as folder:
        weights.save_sharded(random_tensors(), folder, max_shard_bytes=400 * MIB)
        adapter = Path(folder) / "adapter"
        adapter.mkdir()
        write_adapter(adapter)
        command = [sys.executable, __file__, "--measure", folder]
        results = [
            subprocess.run([*command, dtype, *extra]).returncode
            for extra in ([], [str(adapter)])
            for dtype in ("float32", "bfloat16")
        ]
    sys.exit(max(results))


if __name__ == "__main__":
    main()
