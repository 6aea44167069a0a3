"""Qwen-Omni thinkers in plain PyTorch: questions about video with sound."""

from omni.inputs import Inputs
from omni.model import Generation, Omni, Prefill, load

__all__ = ["Generation", "Inputs", "Omni", "Prefill", "load"]
