"""Qwen-Omni thinkers in plain PyTorch: questions about video with sound."""

from omni.engine import Prefill
from omni.inputs import Inputs
from omni.model import Generation, Omni, load
from omni.show import explain, show

__all__ = ["Generation", "Inputs", "Omni", "Prefill", "explain", "load", "show"]
