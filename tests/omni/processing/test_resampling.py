"""Changing the rate of sound: as soxr and librosa do it for the public processors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from clips import write_sound
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omni.processing.frames import MediaError
from omni.processing.media import read_audio
from omni.processing.mel import log_mel

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000]


def noise(channels: int, samples: int) -> np.ndarray:
    return np.random.default_rng(samples).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)


def public(sound: np.ndarray, rate: int) -> np.ndarray:
    """What `librosa.load(path, sr=16000)` makes of (channels, n): mono, soxr's HQ filter, the next whole length."""
    mono = sound.mean(axis=0)
    found = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    length = math.ceil(len(mono) * 16_000 / rate)
    return np.pad(found, (0, max(0, length - len(found))))[:length]


def distance(ours: Tensor | None, theirs: np.ndarray) -> float:
    assert ours is not None and len(ours) == len(theirs)
    return float(np.linalg.norm(ours.numpy() - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2])
def test_noise_of_any_rate_is_as_the_public_pipeline_has_it(tmp_path: Path, rate: int, channels: int) -> None:
    """Protects: within 1e-3 relative, to the sample, though it is read and filtered piece by piece."""
    sound = noise(channels, 3 * rate + 77)
    path = write_sound(tmp_path / "a.wav", sound, rate, "pcm_f32le")
    assert distance(read_audio(path), public(sound, rate)) < 1e-3
    assert distance(read_audio((sound[0], rate)), public(sound[:1], rate)) < 1e-3


@pytest.mark.parametrize(("codec", "scale"), [("pcm_s16le", 2**15), ("pcm_s32le", 2**31), ("pcm_u8", 2**7)])
def test_whole_numbers_are_scaled_as_the_public_readers_do(tmp_path: Path, codec: str, scale: int) -> None:
    sound = noise(1, 44_100)
    path = write_sound(tmp_path / "a.wav", sound, 44_100, codec)
    rounded = np.round(sound.astype(np.float64) * scale) / scale
    assert distance(read_audio(path), public(rounded.astype(np.float32), 44_100)) < max(1e-3, 1 / scale)


@pytest.mark.parametrize(("hertz", "loudness"), [(1000, 1.0), (7000, 1.0), (7300, 1.0), (8300, 0.0), (10_000, 0.0)])
def test_what_passes_and_what_does_not(tmp_path: Path, hertz: int, loudness: float) -> None:
    """Protects: speech keeps its upper end, and nothing above 8 kHz comes back below it."""
    wave = np.sin(2 * np.pi * hertz * np.arange(96_000) / 48_000).astype(np.float32)[None]
    found = read_audio(write_sound(tmp_path / "a.wav", wave, 48_000, "pcm_f32le"))
    assert found is not None
    inner = found[4000:-4000]
    assert float(inner.square().mean().sqrt()) * math.sqrt(2) == pytest.approx(loudness, abs=0.01)


@pytest.mark.parametrize("stretch", [(0.5, 2.0), (1.25, None), (0.0, 0.75)])
def test_a_stretch_is_cut_from_the_whole(tmp_path: Path, stretch: tuple[float, float | None]) -> None:
    """Protects: filtering does not know of the cut: its samples are those of the whole."""
    path = write_sound(tmp_path / "a.flac", noise(1, 3 * 44_100), 44_100, "flac")
    whole, (start, end) = read_audio(path), stretch
    assert whole is not None
    cut = read_audio(path, start=start, end=end)
    assert cut is not None
    assert torch.equal(cut, whole[round(start * 16_000) : None if end is None else round(end * 16_000)])


def test_log_mel_of_a_file_is_that_of_the_public_pipeline(tmp_path: Path) -> None:
    """Protects: from a stereo file at 44.1 kHz to the features that transformers' extractor makes of what librosa
    would read."""
    sound = noise(2, 5 * 44_100 + 11) * np.hanning(5 * 44_100 + 11).astype(np.float32)
    ours = read_audio(write_sound(tmp_path / "a.wav", sound, 44_100, "pcm_f32le"))
    assert ours is not None
    extractor = WhisperFeatureExtractor(feature_size=128)
    batch = extractor(public(sound, 44_100), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    theirs = batch["input_features"][0][:, batch["attention_mask"][0].bool()]
    features = log_mel(ours)
    assert features.shape == theirs.shape
    torch.testing.assert_close(features, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [1, 99, 10_000_001])
def test_rates_of_no_sound_are_refused(rate: int) -> None:
    with pytest.raises(MediaError, match=f"has {rate} samples a second"):
        read_audio((np.zeros(1000, np.float32), rate))


@pytest.mark.parametrize("rate", [100, 4000, 192_000, 384_000, 10_000_000])
def test_unusual_rates_are_read(rate: int) -> None:
    """Protects: whatever the ratio, sound comes out at its length."""
    found = read_audio((np.full(max(1000, rate // 10), 0.25, np.float32), rate))
    assert found is not None and len(found) == math.ceil(max(1000, rate // 10) * 16_000 / rate)
    assert float(found[len(found) // 2]) == pytest.approx(0.25, abs=1e-2)
