"""What is kept between requests: the most recently used, never more than the limit."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import reuse
from omni.processing.frames import QWEN3_OMNI_SIZES, Pixels, VisionSizes
from omni.reuse import LRUCache, digest_of

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 12)),
        st.tuples(st.just("get"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 20), steps=STEPS)
def test_keeps_what_was_used_last_within_its_bytes(limit: int, steps: list[tuple[str, int, int]]) -> None:
    """Against the plainest of models: a dictionary in order of use, cut from the front."""
    kept: LRUCache[object] = LRUCache(limit)
    model: OrderedDict[int, tuple[object, int]] = OrderedDict()
    for what, key, size in steps:
        if what == "put":
            value = object()
            kept.put(key, value, size)
            model.pop(key, None)
            if limit > 0 and size <= limit:
                model[key] = value, size
            while sum(each for _, each in model.values()) > limit:
                model.popitem(last=False)
        elif what == "get":
            if key in model:
                model.move_to_end(key)
            assert kept.get(key) is model.get(key, (None,))[0]
        else:
            kept.clear()
            model.clear()
        assert kept.nbytes == sum(each for _, each in model.values()) <= limit
        assert len(kept) == len(model)


def test_nothing_is_kept_in_no_bytes() -> None:
    kept: LRUCache[str] = LRUCache(0)
    kept.put("key", "value", 0)
    assert kept.get("key") is None
    with pytest.raises(ValueError, match="0 bytes or more"):
        LRUCache(-1)


def test_threads_share_it() -> None:
    """Sums stay right whoever puts, gets and clears at once."""
    kept: LRUCache[int] = LRUCache(50)

    def work(seed: int) -> None:
        for step in range(400):
            key = (seed * 7 + step * 13) % 11
            kept.put(key, key, key)
            found = kept.get((key * 3) % 11)
            assert found is None or found == (key * 3) % 11
            if step % 97 == 0:
                kept.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert kept.nbytes <= 50
    assert kept.nbytes == sum(key for key in range(11) if kept.get(key) is not None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32, torch.bfloat16])
def test_tensors_are_told_by_what_they_hold(dtype: torch.dtype) -> None:
    """Layout does not matter, content, shape and dtype do; so does what is written later, in parts or not."""
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (6, 4, 5)).to(dtype)
    assert digest_of(tensor) == digest_of(tensor) == digest_of(tensor.clone())
    assert digest_of(tensor) == digest_of(tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    with torch.inference_mode():
        assert digest_of(tensor.clone()) == digest_of(tensor)
    others = [tensor.reshape(4, 6, 5), tensor[:5], tensor[0, 0, 0], tensor[:0], tensor.to(torch.float16)]
    assert len({digest_of(each) for each in [tensor, *others]}) == 6
    before = digest_of(tensor)
    tensor[5, 3, 4] = 1 - tensor[5, 3, 4].int()
    assert digest_of(tensor) != before


def test_large_tensors_are_digested_in_parts_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread is first; a change in any part shows; nothing is held on to."""
    monkeypatch.setattr(reuse, "PART_BYTES", 1000)
    calls = []
    part = reuse._digest
    monkeypatch.setattr(reuse, "_digest", lambda data: calls.append(len(data)) or part(data))
    tensor = torch.arange(10_500).to(torch.uint8)
    found = digest_of(tensor)
    assert sorted(calls) == [500] + [1000] * 10
    assert digest_of(tensor) == found and len(calls) == 11
    seen = {found}
    for place in range(0, 10_500, 999):
        tensor[place] += 1
        seen.add(digest_of(tensor))
    assert len(seen) == 12
    held = len(reuse._digests)
    del tensor
    assert len(reuse._digests) == held - 1


def test_clips_are_told_by_what_the_encoder_sees() -> None:
    """The same bytes cut or normalised otherwise are another medium; the same, in whatever prompt, is the same."""
    clip, other = (torch.arange(4 * 3 * 28 * 28).reshape(4, 3, 28, 28).add(n).to(torch.uint8) for n in range(2))
    sizes = VisionSizes(video_mean=(0.5, 0.5, 0.5))
    pixels = Pixels((clip, other), sizes)
    assert pixels.digest(1) == Pixels((other.clone(),), sizes).digest(0)
    digests = {pixels.digest(0), pixels.digest(1), Pixels((clip,), sizes, of_clip=True).digest(0)}
    digests |= {Pixels((clip,), QWEN3_OMNI_SIZES).digest(0)}
    assert len(digests) == 4
