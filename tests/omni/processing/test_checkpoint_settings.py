"""Settings as transformers saves them: one nested file, or flat ones; the same files of the same precedence."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin

from omni.config import QWEN2_5, QWEN3, ConfigError
from omni.processing.frames import VisionSizes, patchify, vision_sizes
from omni.processing.settings import check_sound_settings, read_settings

PICTURES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "image_processor_type": "Qwen2VLImageProcessor",
    "merge_size": 2,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 0.003921568859368563,  # in single precision
    "size": {"longest_edge": 200704, "shortest_edge": 12544},
    "temporal_patch_size": 2,
}
CLIPS = {
    **PICTURES,
    "do_sample_frames": False,
    "image_mean": [0.4, 0.5, 0.6],
    "max_frames": 768,
    "max_video_tokens": 64000,
    "min_frames": 8,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "video_processor_type": "Qwen2VLVideoProcessor",
}
SOUND = WhisperFeatureExtractor(feature_size=128).to_dict()
NESTED = {
    "feature_extractor": SOUND,
    "image_processor": PICTURES,
    "video_processor": CLIPS,
    "processor_class": "Qwen2_5OmniProcessor",
}


def config(family: str = QWEN2_5) -> Any:
    patch = 16 if family == QWEN3 else 14
    vision = types.SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    return types.SimpleNamespace(family=family, vision=vision, audio=types.SimpleNamespace(num_mel_bins=128))


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize(("key", "value"), [("fps", 1), ("max_frames", 32), ("num_frames", 8)])
def test_frames_sampled_otherwise_are_told_of(tmp_path: Path, key: str, value: int) -> None:
    """Protects: what transformers would sample by is not passed over; without do_sample_frames it says nothing."""
    write(tmp_path, video_preprocessor_config={**CLIPS, key: value})
    vision_sizes(tmp_path, config())
    write(tmp_path, video_preprocessor_config={**CLIPS, "do_sample_frames": True, "fps": 2.0})
    vision_sizes(tmp_path, config())
    write(tmp_path, video_preprocessor_config={**CLIPS, "do_sample_frames": True, key: value})
    with pytest.warns(UserWarning, match=f"{key} = {value} is not followed: give fps, max_frames or nframes"):
        vision_sizes(tmp_path, config())


def test_the_nested_file_of_transformers_5_has_its_say(tmp_path: Path) -> None:
    """Protects: changed bounds and colours in processor_config.json, of pictures and of clips, each their own."""
    write(tmp_path, processor_config=NESTED)
    sizes = vision_sizes(tmp_path, config())
    assert (sizes.image_min_pixels, sizes.image_max_pixels) == (12544, 200704)
    assert sizes.colours(of_clip=False) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert sizes.colours(of_clip=True) == ((0.4, 0.5, 0.6), (0.5, 0.6, 0.7))
    assert (sizes.min_frames, sizes.max_video_tokens) == (8, 64000)
    # transformers' processors have the bounds of clips in their code and pass them over what the file says.
    assert (sizes.video_min_pixels, sizes.video_max_pixels) == (128 * 28**2, 768 * 28**2)
    check_sound_settings(tmp_path, config())
    frames = torch.full((2, 3, 28, 28), 51, dtype=torch.uint8)
    values = [patchify(frames, sizes, of_clip=of_clip)[0][0, 0].item() for of_clip in (False, True)]
    assert values == pytest.approx([(0.2 - 0.1) / 0.5, (0.2 - 0.4) / 0.5])


def test_files_take_precedence_as_in_transformers(tmp_path: Path) -> None:
    """Protects: which of several files counts, for each of the three processors."""
    files = {
        "preprocessor_config": {"origin": "flat"},
        "video_preprocessor_config": {"origin": "clips"},
        "processor_config": {kind: {"origin": kind} for kind in ("image_processor", "video_processor")},
    }
    expected = {"image_processor": "", "video_processor": "", "feature_extractor": ""}

    def origins() -> dict[str, str]:
        return {kind: read_settings(tmp_path, kind).values.get("origin", "") for kind in expected}

    assert origins() == expected
    write(tmp_path, preprocessor_config=files["preprocessor_config"])
    assert origins() == dict.fromkeys(expected, "flat")
    write(tmp_path, video_preprocessor_config=files["video_preprocessor_config"])
    assert origins() == {**dict.fromkeys(expected, "flat"), "video_processor": "clips"}
    write(tmp_path, processor_config={"processor_class": "Qwen2_5OmniProcessor"})
    assert origins() == {**dict.fromkeys(expected, "flat"), "video_processor": "clips"}
    write(tmp_path, processor_config=files["processor_config"])
    expected = {kind: kind for kind in expected} | {"feature_extractor": "flat"}
    assert origins() == expected
    assert ImageProcessingMixin.get_image_processor_dict(tmp_path)[0]["origin"] == expected["image_processor"]
    assert FeatureExtractionMixin.get_feature_extractor_dict(tmp_path)[0]["origin"] == expected["feature_extractor"]
    write(tmp_path, processor_config={"audio_processor": {"origin": "sound"}})
    assert origins()["feature_extractor"] == "sound"
    assert FeatureExtractionMixin.get_feature_extractor_dict(tmp_path)[0]["origin"] == "sound"


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("image_processor", {"do_normalize": False}, "image_processor: do_normalize = False is not supported"),
        ("image_processor", {"resample": 2}, "resample = 2 is not supported, only 3"),
        ("image_processor", {"patch_size": 16}, "patch_size = 16 is not supported, only 14"),
        ("image_processor", {"size": {"height": 448, "width": 448}}, "size may have longest_edge and shortest_edge"),
        ("image_processor", {"size": 448}, "size may have longest_edge and shortest_edge alone, not 448"),
        ("image_processor", {"image_std": [0, 1, 1]}, "image_std must be three numbers"),
        ("video_processor", {"image_mean": "x"}, "video_processor: image_mean must be three numbers"),
        ("video_processor", {"rescale_factor": 1.0}, "rescale_factor = 1.0 is not supported"),
        ("video_processor", {"cap_pixels_per_frame": False}, "cap_pixels_per_frame = False is not supported"),
        ("video_processor", {"min_frames": 0}, "min_frames must be a positive integer"),
        ("feature_extractor", {"hop_length": 320}, "feature_extractor: hop_length = 320 is not supported, only 160"),
        ("feature_extractor", {"feature_size": 80}, "feature_size = 80 is not supported, only 128"),
        ("feature_extractor", {"sampling_rate": 48000}, "sampling_rate = 48000 is not supported, only 16000"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path: Path, kind: str, changes: Any, words: str) -> None:
    """Protects: a setting is obeyed or named, never passed over."""
    write(tmp_path, processor_config={**NESTED, kind: {**NESTED[kind], **changes}})
    with pytest.raises(ConfigError, match=rf"processor_config\.json.*{words}"):
        vision_sizes(tmp_path, config())
        check_sound_settings(tmp_path, config())


@pytest.mark.parametrize(("text", "words"), [("{", "not readable JSON"), ('{"image_processor": 1}', "must be an obj")])
def test_damaged_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"processor_config\.json.*{words}"):
        vision_sizes(tmp_path, config())


def test_no_files_leave_the_family_its_numbers(tmp_path: Path) -> None:
    assert vision_sizes(tmp_path, config()) == VisionSizes()
    check_sound_settings(tmp_path, config())
