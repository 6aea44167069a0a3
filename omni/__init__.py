"""Qwen-Omni thinkers in plain PyTorch: questions about video with sound."""
