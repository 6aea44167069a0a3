"""Public checkpoints: hub id or folder, safetensors shards, parameters."""

from weights.checkpoint import CheckpointError, StoredTensor, read_index
from weights.load import Destination, clear, fill
from weights.names import qwen2_5_omni, qwen3_omni_moe
from weights.save import save_sharded
from weights.source import locate

__all__ = [
    "CheckpointError",
    "Destination",
    "StoredTensor",
    "clear",
    "fill",
    "locate",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "read_index",
    "save_sharded",
]
