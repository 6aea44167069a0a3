"""Messages → the tensors of one request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.config import OmniConfig
from omni.encoders.audio import token_count
from omni.inputs import Inputs
from omni.processing.chat import QWEN2_5_OMNI_TEMPLATE, encode_chat, load_template
from omni.processing.prompt import clip_block, expand
from omni.processing.tokenizer import Tokenizer


class Processor:
    """The parts of a checkpoint that turn text and media into tensors: vocabulary, template, sizes."""

    def __init__(self, folder: Path, config: OmniConfig) -> None:
        self.config = config
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = load_template(folder) or QWEN2_5_OMNI_TEMPLATE

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ends of a turn, for checkpoints that name none."""
        return tuple(self.tokenizer.id_of(token) for token in ("<|im_end|>", "<|endoftext|>"))
