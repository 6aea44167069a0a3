"""Public tensor names of each family and the parameters they fill."""

from __future__ import annotations

from weights.load import Destination


def qwen2_5_omni(
    *,
    vision_depth: int,
    vision_size: int,
    vision_intermediate: int,
    audio_layers: int,
    decoder_layers: int,
    query_rows: int,
    key_rows: int,
    decoder_intermediate: int,
    tied_head: bool,
) -> dict[str, Destination]:
    """Qwen2.5-Omni's thinker as released (`thinker.*`) → parameters of `omni.thinker.Thinker`.

    Rows are those of the fused products: `query_rows` = heads · head_dim, `key_rows` = kv_heads · head_dim,
    the sizes are channels. With a tied head there is no `lm_head`.
    """
    names: dict[str, Destination] = {}

    def add(public: str, parameter: str, kinds: str = "weight bias", rows: slice | None = None) -> None:
        for kind in kinds.split():
            names[f"thinker.{public}.{kind}"] = Destination(f"{parameter}.{kind}", rows)

    def add_stacked(public: str, parameter: str, parts: dict[str, int], kinds: str = "weight bias") -> None:
        start = 0
        for part, rows in parts.items():
            add(f"{public}.{part}", parameter, kinds, slice(start, start + rows))
            start += rows

    names["thinker.visual.patch_embed.proj.weight"] = Destination("vision.patch_embedding")
    add("visual.merger.ln_q", "vision.merger.norm", "weight")
    add("visual.merger.mlp.0", "vision.merger.hidden")
    add("visual.merger.mlp.2", "vision.merger.output")
    for index in range(vision_depth):
        public, block = f"visual.blocks.{index}", f"vision.blocks.{index}"
        add(f"{public}.norm1", f"{block}.attention_norm", "weight")
        add(f"{public}.norm2", f"{block}.mlp_norm", "weight")
        add_stacked(f"{public}.attn", f"{block}.attention.qkv", dict.fromkeys("qkv", vision_size))
        add(f"{public}.attn.proj", f"{block}.attention.output")
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), vision_intermediate)
        add_stacked(f"{public}.mlp", f"{block}.mlp.gate_up", gate_up)
        add(f"{public}.mlp.down_proj", f"{block}.mlp.down")

    add("audio_tower.conv1", "audio.conv1")
    add("audio_tower.conv2", "audio.conv2")
    add("audio_tower.ln_post", "audio.norm")
    add("audio_tower.proj", "audio.output")
    add("audio_tower.audio_bos_eos_token", "audio.boundary", "weight")
    for index in range(audio_layers):
        public, block = f"audio_tower.layers.{index}", f"audio.blocks.{index}"
        add(f"{public}.self_attn_layer_norm", f"{block}.attention_norm")
        add(f"{public}.final_layer_norm", f"{block}.mlp_norm")
        add(f"{public}.self_attn.q_proj", f"{block}.attention.query")
        add(f"{public}.self_attn.k_proj", f"{block}.attention.key", "weight")
        add(f"{public}.self_attn.v_proj", f"{block}.attention.value")
        add(f"{public}.self_attn.out_proj", f"{block}.attention.output")
        add(f"{public}.fc1", f"{block}.up")
        add(f"{public}.fc2", f"{block}.down")

    add("model.embed_tokens", "embedding", "weight")
    add("model.norm", "norm", "weight")
    if not tied_head:
        add("lm_head", "head", "weight")
    for index in range(decoder_layers):
        public, layer = f"model.layers.{index}", f"layers.{index}"
        add(f"{public}.input_layernorm", f"{layer}.attention_norm", "weight")
        add(f"{public}.post_attention_layernorm", f"{layer}.mlp_norm", "weight")
        qkv = {"q_proj": query_rows, "k_proj": key_rows, "v_proj": key_rows}
        add_stacked(f"{public}.self_attn", f"{layer}.attention.qkv", qkv)
        add(f"{public}.self_attn.o_proj", f"{layer}.attention.output", "weight")
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), decoder_intermediate)
        add_stacked(f"{public}.mlp", f"{layer}.mlp.gate_up", gate_up, "weight")
        add(f"{public}.mlp.down_proj", f"{layer}.mlp.down", "weight")
    return names
