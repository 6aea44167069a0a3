"""Public checkpoints: hub id or folder, safetensors shards, parameters."""
