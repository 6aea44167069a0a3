"""What a checkpoint's files say of pictures, clips and sounds, in transformers' order of precedence.

transformers 5 saves one processor_config.json with an object for each; before, preprocessor_config.json held them all,
and video_preprocessor_config.json those of clips alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.config import ConfigError, OmniConfig
from weights.files import read_object

NESTED_FILE = "processor_config.json"
FLAT_FILES = {
    "image_processor": ("preprocessor_config.json",),
    "video_processor": ("video_preprocessor_config.json", "preprocessor_config.json"),
    "feature_extractor": ("preprocessor_config.json",),
}
"""Object of processor_config.json → files that hold the same without it, the first first."""


@dataclass(frozen=True)
class Settings:
    """One processor's settings. where: their file and object, for errors."""

    values: Mapping[str, Any]
    where: str

    def expect(self, **allowed: Any) -> None:
        """Refuses what would change the result: a key that is there and not as allowed. Raises ConfigError."""
        for key, value in allowed.items():
            stated = self.values.get(key)
            # Some files have 1 / 255 in single precision.
            close = isinstance(stated, float) and isinstance(value, float) and math.isclose(stated, value, rel_tol=1e-6)
            if stated is not None and stated != value and not close:
                raise ConfigError(f"{self.where}: {key} = {stated!r:.80} is not supported, only {value!r}.")


def read_settings(folder: Path, kind: str) -> Settings:
    """The settings of a kind in `FLAT_FILES`, empty where no file has any. Raises ConfigError."""
    nested = folder / NESTED_FILE
    if nested.is_file():
        whole = _read(nested)
        for name in (kind, "audio_processor") if kind == "feature_extractor" else (kind,):
            if whole.get(name) is not None:
                if not isinstance(whole[name], Mapping):
                    raise ConfigError(f"{nested}: {name} must be an object, not {whole[name]!r:.80}.")
                return Settings(whole[name], f"{nested}, {name}")
    for name in FLAT_FILES[kind]:
        if (folder / name).is_file():
            return Settings(_read(folder / name), str(folder / name))
    return Settings({}, "")


def check_sound_settings(folder: Path, config: OmniConfig) -> None:
    """Refuses spectrograms other than those of `omni.processing.mel`. Raises ConfigError.

    `chunk_length` and `n_samples`, where transformers cuts a sound, change nothing here: it is encoded whole.
    """
    read_settings(folder, "feature_extractor").expect(
        feature_size=config.audio.num_mel_bins,
        sampling_rate=16_000,
        hop_length=160,
        n_fft=400,
        dither=0.0,
        padding_value=0.0,
        padding_side="right",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON: {error}.") from None
