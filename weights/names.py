"""Public tensor names of each family and the parameters they fill; and the layouts in which checkpoints spell them.

Rows are those of fused products: `query_rows` = heads · head_dim, `key_rows` = kv_heads · head_dim; sizes are channels.
`vision_padded`: of the vision encoder's intermediate size, filled up with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weights.checkpoint import CheckpointError, listing_file, no_checkpoint, read_names
from weights.load import Destination

RELEASED = {"audio_tower": "audio_tower", "visual": "visual", "model": "model", "lm_head": "lm_head"}
TRANSFORMERS_5 = {
    "audio_tower": "model.audio_tower",
    "visual": "model.visual",
    "model": "model.language_model",
    "lm_head": "lm_head",
}
"""First part of a name after `thinker.` → how it is spelled: in the released files, and in the memory of transformers
5, which writes the released names unless told otherwise; trainers that write what is in memory do not.
"""

BUFFERS = re.compile(
    r"thinker\.(model\.(layers\.\d+\.self_attn\.)?rotary_emb|visual\.rotary_pos_emb)\.(original_)?inv_freq"
    r"|thinker\.audio_tower\.positional_embedding\.positional_embedding"
)
"""Released names of tables that follow from the configuration: some trainers save them along, and nobody needs them."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint spells a thinker's tensors, whose released names are `thinker.`, a part of `RELEASED`, a module.

    prefix: "thinker.", or nothing where the thinker was saved alone. parts: `RELEASED` or `TRANSFORMERS_5`.
    fused_experts: whether an expert layer has one tensor for all gates and ups and one for all downs.
    """

    prefix: str = "thinker."
    parts: tuple[tuple[str, str], ...] = tuple(RELEASED.items())
    fused_experts: bool = False

    def spell(self, released: str) -> str:
        """A released name in this layout."""
        part, dot, module = released.removeprefix("thinker.").partition(".")
        return f"{self.prefix}{dict(self.parts)[part]}{dot}{module}"

    def released(self, spelled: str) -> str | None:
        """The released name of one in this layout; None for one that has none."""
        name = spelled.removeprefix(self.prefix)
        for part, spelling in self.parts:
            if name.startswith(f"{spelling}."):
                return f"thinker.{part}{name.removeprefix(spelling)}"
        return None

    def buffers(self, names: Collection[str]) -> set[str]:
        """Those of the names that `BUFFERS` describes."""
        return {name for name in names if BUFFERS.fullmatch(self.released(name) or "")}


def layout_of(names: Collection[str]) -> Layout:
    """The layout of a checkpoint with these tensor names. Raises CheckpointError where they are no thinker's.

    By names alone, each property for itself; what does not fit then is missing or unexpected, by name.
    """
    prefix = "thinker." if any(name.startswith("thinker.") for name in names) else ""
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def has(*parts: str) -> bool:
        return any(name.startswith(tuple(f"{part}." for part in parts)) for name in own)

    encoders = "audio_tower", "visual"
    deeper = has(*(TRANSFORMERS_5[part] for part in (*encoders, "model")))
    if not (prefix or deeper or has(*encoders)):
        raise CheckpointError(
            "names no tensor that starts with 'thinker.', nor those of a thinker alone (audio_tower., visual., model.)"
        )
    fused = any(name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for name in own)
    return Layout(prefix, tuple((TRANSFORMERS_5 if deeper else RELEASED).items()), fused)


def released_name(spelled: str) -> str | None:
    """The released name of one in any layout, with `thinker.` or not; None for one that has none."""
    prefix = "thinker." if spelled.startswith("thinker.") else ""
    layouts = (Layout(prefix, tuple(parts.items())) for parts in (TRANSFORMERS_5, RELEASED))
    return next((name for layout in layouts if (name := layout.released(spelled))), None)


def read_layout(folder: Path) -> Layout:
    """The layout of the checkpoint in a folder, by its index or its one file. Raises CheckpointError."""
    names = read_names(folder)
    if names is None:
        raise no_checkpoint(folder)
    try:
        return layout_of(names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / str(listing_file(folder))} {error}.") from None


class _Names:
    """Public name → destination, grown line by line."""

    def __init__(self) -> None:
        self.all: dict[str, Destination] = {}

    def add(
        self,
        public: str,
        parameter: str,
        kinds: str = "weight bias",
        rows: slice | None = None,
        entry: int | None = None,
        zeros: tuple[int, int] = (0, 0),
    ) -> None:
        """Tensors of one module: `public` and `parameter` each followed by the kinds."""
        for kind in kinds.split():
            # A parameter that stacks modules is no module: it has no kinds.
            owner = parameter if entry is not None else f"{parameter}.{kind}"
            self.all[f"thinker.{public}.{kind}"] = Destination(owner, rows, entry, zeros)

    def fuse(
        self,
        public: str,
        parameter: str,
        parts: Mapping[str, int],
        kinds: str = "weight bias",
        entry: int | None = None,
        zeros: int = 0,
    ) -> None:
        """Modules `public.part` fill `parameter` one below the other. parts: their names and rows; zeros: more rows
        after each."""
        start = 0
        for part, rows in parts.items():
            end = start + rows + zeros
            self.add(f"{public}.{part}", parameter, kinds, slice(start, end), entry, (zeros, 0))
            start = end

    def add_audio_blocks(self, layers: int, key_kinds: str) -> None:
        for index in range(layers):
            public, block = f"audio_tower.layers.{index}", f"audio.blocks.{index}"
            self.add(f"{public}.self_attn_layer_norm", f"{block}.attention_norm")
            self.add(f"{public}.final_layer_norm", f"{block}.mlp_norm")
            self.add(f"{public}.self_attn.q_proj", f"{block}.attention.query")
            self.add(f"{public}.self_attn.k_proj", f"{block}.attention.key", key_kinds)
            self.add(f"{public}.self_attn.v_proj", f"{block}.attention.value")
            self.add(f"{public}.self_attn.out_proj", f"{block}.attention.output")
            self.add(f"{public}.fc1", f"{block}.up")
            self.add(f"{public}.fc2", f"{block}.down")

    def add_ends(self, tied_head: bool) -> None:
        """Embedding, last norm and, where it is not tied, the head."""
        self.add("model.embed_tokens", "embedding", "weight")
        self.add("model.norm", "norm", "weight")
        if not tied_head:
            self.add("lm_head", "head", "weight")

    def add_attention(self, index: int, query_rows: int, key_rows: int, kinds: str) -> None:
        """A decoder layer without its MLP."""
        public, layer = f"model.layers.{index}", f"layers.{index}"
        self.add(f"{public}.input_layernorm", f"{layer}.attention_norm", "weight")
        self.add(f"{public}.post_attention_layernorm", f"{layer}.mlp_norm", "weight")
        qkv = {"q_proj": query_rows, "k_proj": key_rows, "v_proj": key_rows}
        self.fuse(f"{public}.self_attn", f"{layer}.attention.qkv", qkv, kinds)
        self.add(f"{public}.self_attn.o_proj", f"{layer}.attention.output", "weight")

    def add_dense(self, index: int, intermediate: int) -> None:
        public, mlp = f"model.layers.{index}.mlp", f"layers.{index}.mlp"
        self.fuse(public, f"{mlp}.gate_up", dict.fromkeys(("gate_proj", "up_proj"), intermediate), "weight")
        self.add(f"{public}.down_proj", f"{mlp}.down", "weight")


def qwen2_5_omni(
    *,
    vision_depth: int,
    vision_size: int,
    vision_intermediate: int,
    vision_padded: int,
    audio_layers: int,
    decoder_layers: int,
    query_rows: int,
    key_rows: int,
    decoder_intermediate: int,
    tied_head: bool,
) -> dict[str, Destination]:
    """Qwen2.5-Omni's thinker as released (`thinker.*`) → parameters of `omni.thinker.Thinker`."""
    names = _Names()
    names.all["thinker.visual.patch_embed.proj.weight"] = Destination("vision.patch_embedding")
    names.add("visual.merger.ln_q", "vision.merger.norm", "weight")
    names.add("visual.merger.mlp.0", "vision.merger.hidden")
    names.add("visual.merger.mlp.2", "vision.merger.output")
    for index in range(vision_depth):
        public, block = f"visual.blocks.{index}", f"vision.blocks.{index}"
        names.add(f"{public}.norm1", f"{block}.attention_norm", "weight")
        names.add(f"{public}.norm2", f"{block}.mlp_norm", "weight")
        names.fuse(f"{public}.attn", f"{block}.attention.qkv", dict.fromkeys("qkv", vision_size))
        names.add(f"{public}.attn.proj", f"{block}.attention.output")
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), vision_intermediate)
        zeros = vision_padded - vision_intermediate
        names.fuse(f"{public}.mlp", f"{block}.mlp.gate_up", gate_up, zeros=zeros)
        names.add(f"{public}.mlp.down_proj", f"{block}.mlp.down", "weight", zeros=(0, zeros))
        names.add(f"{public}.mlp.down_proj", f"{block}.mlp.down", "bias")

    names.add("audio_tower.conv1", "audio.conv1")
    names.add("audio_tower.conv2", "audio.conv2")
    names.add("audio_tower.ln_post", "audio.norm")
    names.add("audio_tower.proj", "audio.output")
    names.add("audio_tower.audio_bos_eos_token", "audio.boundary", "weight")
    names.add_audio_blocks(audio_layers, key_kinds="weight")

    names.add_ends(tied_head)
    for index in range(decoder_layers):
        names.add_attention(index, query_rows, key_rows, "weight bias")
        names.add_dense(index, decoder_intermediate)
    return names.all


def qwen3_omni_moe(
    *,
    vision_depth: int,
    vision_intermediate: int,
    vision_padded: int,
    deepstack_levels: int,
    audio_layers: int,
    sparse_layers: Sequence[bool],
    query_rows: int,
    key_rows: int,
    dense_intermediate: int,
    num_experts: int,
    expert_intermediate: int,
    tied_head: bool,
    fused_experts: bool = False,
) -> dict[str, Destination]:
    """Qwen3-Omni's thinker as released (`thinker.*`) → parameters of `omni.thinker.Thinker`.

    sparse_layers: per decoder layer, whether it has experts. Their tensors are public one by one, or `fused_experts`.
    """
    names = _Names()
    names.all["thinker.visual.patch_embed.proj.weight"] = Destination("vision.patch_embedding")
    names.all["thinker.visual.patch_embed.proj.bias"] = Destination("vision.patch_bias")
    names.add("visual.pos_embed", "vision.positions", "weight")
    mergers = {"merger": "merger"}
    mergers |= {f"merger_list.{level}": f"deep_mergers.{level}" for level in range(deepstack_levels)}
    for public, merger in mergers.items():
        names.add(f"visual.{public}.ln_q", f"vision.{merger}.norm")
        names.add(f"visual.{public}.mlp.0", f"vision.{merger}.hidden")
        names.add(f"visual.{public}.mlp.2", f"vision.{merger}.output")
    for index in range(vision_depth):
        public, block = f"visual.blocks.{index}", f"vision.blocks.{index}"
        names.add(f"{public}.norm1", f"{block}.attention_norm")
        names.add(f"{public}.norm2", f"{block}.mlp_norm")
        names.add(f"{public}.attn.qkv", f"{block}.attention.qkv")
        names.add(f"{public}.attn.proj", f"{block}.attention.output")
        zeros = vision_padded - vision_intermediate
        names.add(f"{public}.mlp.linear_fc1", f"{block}.mlp.up", zeros=(zeros, 0))
        names.add(f"{public}.mlp.linear_fc2", f"{block}.mlp.down", "weight", zeros=(0, zeros))
        names.add(f"{public}.mlp.linear_fc2", f"{block}.mlp.down", "bias")

    for index in range(3):
        names.add(f"audio_tower.conv2d{index + 1}", f"audio.convolutions.{index}")
    names.add("audio_tower.conv_out", "audio.input", "weight")
    names.add("audio_tower.ln_post", "audio.norm")
    names.add("audio_tower.proj1", "audio.hidden")
    names.add("audio_tower.proj2", "audio.output")
    names.add_audio_blocks(audio_layers, key_kinds="weight bias")

    names.add_ends(tied_head)
    for index, sparse in enumerate(sparse_layers):
        names.add_attention(index, query_rows, key_rows, "weight")
        public, layer = f"model.layers.{index}", f"layers.{index}"
        names.add(f"{public}.self_attn.q_norm", f"{layer}.attention.query_norm", "weight")
        names.add(f"{public}.self_attn.k_norm", f"{layer}.attention.key_norm", "weight")
        if not sparse:
            names.add_dense(index, dense_intermediate)
            continue
        names.add(f"{public}.mlp.gate", f"{layer}.mlp.router", "weight")
        if fused_experts:
            names.all[f"thinker.{public}.mlp.experts.gate_up_proj"] = Destination(f"{layer}.mlp.gate_up")
            names.all[f"thinker.{public}.mlp.experts.down_proj"] = Destination(f"{layer}.mlp.down")
            continue
        for expert in range(num_experts):
            gate_up = dict.fromkeys(("gate_proj", "up_proj"), expert_intermediate)
            names.fuse(f"{public}.mlp.experts.{expert}", f"{layer}.mlp.gate_up", gate_up, "weight", expert)
            names.add(f"{public}.mlp.experts.{expert}.down_proj", f"{layer}.mlp.down", "weight", entry=expert)
    return names.all
