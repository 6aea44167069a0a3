"""Public checkpoints: hub id or folder, safetensors shards, parameters."""

from weights.adapters import CONFIG_FILE as ADAPTER_CONFIG
from weights.adapters import base_of, read_adapter
from weights.checkpoint import CheckpointError, StoredTensor, read_index, read_names
from weights.load import Destination, LowRank, check_names, clear, equal, fill
from weights.memory import check_memory
from weights.names import Layout, layout_of, qwen2_5_omni, qwen3_omni_moe, read_layout
from weights.save import save_sharded
from weights.source import locate, locate_adapter

__all__ = [
    "ADAPTER_CONFIG",
    "CheckpointError",
    "Destination",
    "Layout",
    "LowRank",
    "StoredTensor",
    "base_of",
    "check_memory",
    "check_names",
    "clear",
    "equal",
    "fill",
    "layout_of",
    "locate",
    "locate_adapter",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "read_adapter",
    "read_index",
    "read_layout",
    "read_names",
    "save_sharded",
]
