"""Measures what loading costs: peak host memory above the parameters, against the largest tensor.

    python scripts/measure_load.py

Writes a random bfloat16 checkpoint of more than 1 GB into a temporary folder, loads it in a fresh process into
float32 and into bfloat16, and fails where loading took more memory above the parameters than the largest
tensor has in the file.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import weights

MIB = 1 << 20
VOCABULARY, WIDTH, HIDDEN, LAYERS, EXPERTS = 65536, 1536, 4096, 8, 16


class Layer(nn.Module):
    """Parameters alone: one product for queries, keys and values; experts stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(2 * WIDTH, WIDTH))
        self.gate_up = nn.Parameter(torch.empty(2 * HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(WIDTH, HIDDEN))
        self.experts = nn.Parameter(torch.empty(EXPERTS, 2 * 768, WIDTH))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(VOCABULARY, WIDTH))
        self.head = nn.Parameter(torch.empty(VOCABULARY, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


def destinations() -> dict[str, weights.Destination]:
    names = {f"thinker.{name}": weights.Destination(name) for name in ("embedding", "head")}
    for index in range(LAYERS):
        layer = f"layers.{index}"
        heads = {"q": slice(0, WIDTH), "k": slice(WIDTH, WIDTH * 3 // 2), "v": slice(WIDTH * 3 // 2, 2 * WIDTH)}
        for part, rows in heads.items():
            names[f"thinker.{layer}.{part}"] = weights.Destination(f"{layer}.qkv", rows)
        for part, rows in {"gate": slice(0, HIDDEN), "up": slice(HIDDEN, 2 * HIDDEN)}.items():
            names[f"thinker.{layer}.{part}"] = weights.Destination(f"{layer}.gate_up", rows)
        names[f"thinker.{layer}.down"] = weights.Destination(f"{layer}.down")
        for expert in range(EXPERTS):
            for part, rows in {"gate": slice(0, 768), "up": slice(768, 1536)}.items():
                name = f"thinker.{layer}.experts.{expert}.{part}"
                names[name] = weights.Destination(f"{layer}.experts", rows, entry=expert)
    return names


def random_tensors() -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    with torch.device("meta"):
        parameters = dict(Model().named_parameters())
    for name, destination in destinations().items():
        shape = destination.view(parameters[destination.parameter]).shape
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_()


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


def measure(folder: Path, dtype: torch.dtype) -> bool:
    """Loads in this process and prints the figures; whether the claim holds."""
    with torch.device("meta"):
        model = Model()
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
    weights.fill(model, folder, destinations(), device="cpu", dtype=dtype)
    seconds = time.perf_counter() - start
    peak.running = False
    peak.join()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    above = memory()["VmHWM"] - before["VmRSS"] - parameters
    anonymous = peak.bytes["RssAnon"] - before["RssAnon"] - parameters
    mapped = peak.bytes["RssFile"] - before["RssFile"]
    holds = max(above, anonymous, mapped) < largest
    print(
        f"{dtype}: {total / 1e9:.2f} GB in {len(stored)} tensors, {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)",
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
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, dtype = options.measure
        sys.exit(not measure(Path(folder), getattr(torch, dtype)))
    with tempfile.TemporaryDirectory() as folder:
        weights.save_sharded(random_tensors(), folder, max_shard_bytes=400 * MIB)
        command = [sys.executable, __file__, "--measure", folder]
        results = [subprocess.run([*command, dtype]).returncode for dtype in ("float32", "bfloat16")]
    sys.exit(max(results))


if __name__ == "__main__":
    main()
