"""How long each layer of a decoder needs video and sound: accuracy when they are removed after layer n, for every n.

    python scripts/tiny/world.py .world/validation --split validation --count 40
    python scripts/tiny/analyze_layers.py .world/validation                        # the checkpoint tiny

After arXiv 2605.20035: in shallow layers everything is needed, in the middle the text takes in what it asks for, and
late layers see text alone as well as all. Prints the table, the blocks and the layers that follow from it for
`seats.SeatsConfig`; saves both and draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from evaluate import arguments, estimate, load, messages, read_questions, save
from torch import Tensor

from omni.decoder import Layer
from omni.inputs import Inputs
from omni.model import Omni
from omni.processing.positions import layout
from omni.request import fill_pool, whole_prompt
from seats.plan import plan_without_selection

REMOVED = ("video", "audio", "both")
SHALLOW, LATE = 0.1, 0.98
"""Shares of what video and sound bring, from none of them to all: below the first a removal is fatal, above the second
it costs nothing."""


@torch.inference_mode()
def letters_when_removed(model: Omni, inputs: Inputs, letters: Tensor) -> Tensor:
    """(3, layers + 1): which of four answers is likeliest when REMOVED goes after layer n, from before the first on."""
    thinker = model.thinker
    where = layout(inputs, model.config)
    prompt = whole_prompt(inputs.input_ids.shape[1])
    plan = plan_without_selection(len(thinker.layers), prompt.counts(None))
    features, _ = thinker.encode(inputs)
    request = fill_pool(plan, prompt, where, inputs.input_ids, features, {}, model.device)
    x, deepstack = thinker.embed(request.ids, request.source, request.media)

    def through(x: Tensor, added: Tensor | None, rotary: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, _, _ = cast(Layer, thinker.layers[index]).prefill(x, rotary)
        return x + added[index] if added is not None and index < len(added) else x

    rotary = thinker.rotary(request.positions)
    states = [x]
    for index in range(len(thinker.layers)):
        states.append(through(states[-1], deepstack, rotary, index))
    picked = torch.empty(len(REMOVED), len(states), dtype=torch.long)
    for row, removed in enumerate(REMOVED):
        gone = torch.zeros(inputs.input_ids.shape[1], dtype=torch.bool)
        for name in ("video", "audio") if removed == "both" else (removed,):
            gone[getattr(where, name)] = True
        kept = (~gone).nonzero().flatten().to(model.device)
        shorter = thinker.rotary(request.positions[:, :, kept])
        for after, state in enumerate(states):
            x, added = state[:, kept], None if deepstack is None else deepstack[:, :, kept]
            for index in range(after, len(thinker.layers)):
                x = through(x, added, shorter, index)
            picked[row, after] = thinker.logits(x[:, -1])[0, letters].argmax()
    return picked


def blocks(accuracy: Sequence[float]) -> tuple[int, int]:
    """The last shallow and the first late layer, from 1, by accuracy when all goes after layer 0, 1, …, all layers."""
    none, everything = accuracy[0], accuracy[-1]
    if everything <= none:
        raise SystemExit("With video and sound no more answers are right than without: there are no layers to suggest.")
    brought = [(each - none) / max(everything - none, 1e-9) for each in accuracy]
    shallow = max((after for after, share in enumerate(brought) if share < SHALLOW), default=0)
    late = next(after for after in range(len(brought)) if all(share >= LATE for share in brought[after:]))
    return min(shallow, late), late + 1


def suggested(shallow: int, late: int, num_layers: int) -> tuple[list[int], int | None]:
    """drop_layers, three at most and spread over the middle block, and late_layer; None where no layer is late."""
    late_layer = late if late <= num_layers else None
    last = late_layer - 2 if late_layer else num_layers - 1
    first = min(max(1, shallow), last)
    count = min(3, last - first + 1)
    drops = sorted({round(first + step * (last - first) / max(1, count - 1)) for step in range(count)})
    return [layer for layer in drops if layer >= 1], late_layer


def main() -> None:
    from tqdm import tqdm

    parser = arguments("Accuracy when video and sound are removed after each layer; multiple choice alone is asked.")
    options = parser.parse_args()
    model = load(options)
    tokenizer = model.tokenizer
    letters = torch.tensor([tokenizer.encode(letter)[0] for letter in "ABCD"], device=model.device)
    questions = [question for question in read_questions(options.folder) if question["options"]][: options.limit]
    right: dict[str, list[Tensor]] = {}
    for question in tqdm(questions, unit="question"):
        picked = letters_when_removed(model, model.prepare(messages(question, options.folder)), letters)
        right.setdefault(question["media"], []).append(picked == question["options"].index(question["answer"]))
    clips = [torch.stack(each) for each in right.values()]
    table: dict[str, list[dict[str, Any]]] = {}
    for row, removed in enumerate(REMOVED):
        table[removed] = []
        for after in range(clips[0].shape[2]):
            table[removed].append(estimate([clip[:, row, after].tolist() for clip in clips]))
    num_layers = model.config.decoder.num_layers
    shallow, late = blocks([each["mean"] for each in table["both"]])
    drops, late_layer = suggested(shallow, late, num_layers)
    print("after layer " + " ".join(f"{after:6}" for after in range(num_layers + 1)))
    for removed, row_found in table.items():
        print(f"{removed:11} " + " ".join(f"{each['mean']:6.1%}" for each in row_found))
    print(f"shallow: layers 1 to {shallow}; late: from {late}; suggested drop_layers {drops}, late_layer {late_layer}")
    result: dict[str, Any] = {
        "model": Path(options.model).name,
        "questions": len(questions),
        "clips": len(clips),
        "removed": table,
        "shallow": shallow,
        "late": late,
        "drop_layers": drops,
        "late_layer": late_layer,
    }
    save(options.results, f"{Path(options.model).name}-layers", result)


if __name__ == "__main__":
    main()
