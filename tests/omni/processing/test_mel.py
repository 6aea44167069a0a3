"""Log-mel against transformers' WhisperFeatureExtractor, live."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omni.processing import mel
from omni.processing.frames import MediaError
from omni.processing.media import read_audio
from omni.processing.mel import log_mel, mel_filters

JFK = Path(__file__).parents[4] / "shared/data/media/jfk.flac"


def public(waveform: Tensor, chunk_length: int = 30) -> Tensor:
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=chunk_length)
    batch = extractor(
        waveform.numpy(),
        sampling_rate=16_000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    return batch["input_features"][0][:, batch["attention_mask"][0].bool()]


def noise(samples: int, scale: float = 0.1) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * scale


def assert_same(waveform: Tensor, chunk_length: int = 30) -> None:
    ours, theirs = log_mel(waveform), public(waveform, chunk_length)
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161, 199, 200, 201, 399, 400, 401, 16_000, 77_777])
def test_noise_of_any_length_equals_the_public_extractor(samples: int) -> None:
    """Mirroring at the start, zeros at the end and the number of frames are the public ones."""
    assert_same(noise(samples))


@pytest.mark.parametrize("lengths", [(16_000,), (16_001,), (16_159, 16_100), (77_777, 401, 77_700), (48_000, 300)])
def test_padding_to_the_longest_equals_the_public_extractor(lengths: tuple[int, ...]) -> None:
    """Qwen3-Omni's way: the longest sound is mirrored at its end and loses the frame that is not full."""
    waveforms = [noise(length) for length in lengths]
    batch = WhisperFeatureExtractor(feature_size=128)(
        [waveform.numpy() for waveform in waveforms],
        sampling_rate=16_000,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    for waveform, features, mask in zip(waveforms, batch["input_features"], batch["attention_mask"], strict=True):
        ours, theirs = log_mel(waveform, padded_to=max(lengths)), features[:, mask.bool()]
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("hertz", [60, 440, 1000, 7900])
def test_tones_equal_the_public_extractor(hertz: int) -> None:
    """The filters sit at the right frequencies, and the cut at 80 dB is the public one."""
    assert_same(0.7 * torch.sin(2 * math.pi * hertz * torch.arange(40_000) / 16_000))


def test_silence_equals_the_public_extractor() -> None:
    """Silence is the floor of the logarithm, not its negative infinity."""
    assert_same(torch.zeros(5000))


@pytest.mark.parametrize("samples", [160, 161, 320, 8000])
def test_the_loudest_bin_may_lie_behind_the_last_valid_frame(samples: int) -> None:
    """A click at the very end is loudest in a frame that is masked away, and still sets the range."""
    waveform = torch.full((samples,), 1e-4)
    waveform[-1] = 1.0
    assert_same(waveform)


@pytest.mark.skipif(not JFK.exists(), reason="shared media are absent")
def test_speech_equals_the_public_extractor() -> None:
    """The same on real speech, under the chunk length of the public checkpoint."""
    waveform = read_audio(JFK)
    assert waveform is not None
    assert_same(waveform, chunk_length=300)


def test_long_sound_is_not_truncated() -> None:
    """Past 300 s, where the public checkpoint's extractor cuts, ours goes on as a longer one would."""
    waveform = noise(16_000 * 305 + 77)
    assert log_mel(waveform).shape[1] == 30_501
    assert_same(waveform, chunk_length=310)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not depend on how many frames are transformed at a time."""
    waveform = noise(50_001)
    whole = log_mel(waveform)
    monkeypatch.setattr(mel, "BLOCK", 7)
    torch.testing.assert_close(log_mel(waveform), whole, atol=1e-5, rtol=0)


def test_filters_equal_the_public_ones() -> None:
    """The filter bank built from the definition is the public one."""
    theirs = torch.from_numpy(WhisperFeatureExtractor(feature_size=128).mel_filters).T.float()
    torch.testing.assert_close(mel_filters(128), theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 100), torch.zeros(9, dtype=torch.int16)])
def test_what_is_no_waveform_is_named(bad: Tensor) -> None:
    """Empty, stereo and integer sound are refused with a sentence."""
    with pytest.raises(MediaError, match="waveform must be"):
        log_mel(bad)
