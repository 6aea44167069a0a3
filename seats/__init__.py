"""SEATS: stage-adaptive token selection as pure tensor functions (arXiv 2605.20035). Knows no model."""

from seats.config import SeatsConfig, preset, preset_for
from seats.cost import prefill_macs
from seats.diversity import win_div_prune
from seats.method import Method
from seats.methods import METHODS, method_for, register
from seats.schedule import keep_ratios
from seats.selection import select_by_relevance

__all__ = [
    "METHODS",
    "Method",
    "SeatsConfig",
    "keep_ratios",
    "method_for",
    "prefill_macs",
    "preset",
    "preset_for",
    "register",
    "select_by_relevance",
    "win_div_prune",
]
