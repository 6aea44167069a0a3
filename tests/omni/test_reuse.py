"""What is kept between requests: the most recently used, never more than the limit."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.reuse import Kept

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
    kept: Kept[object] = Kept(limit)
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
    kept: Kept[str] = Kept(0)
    kept.put("key", "value", 0)
    assert kept.get("key") is None
    with pytest.raises(ValueError, match="0 bytes or more"):
        Kept(-1)


def test_threads_share_it() -> None:
    """Sums stay right whoever puts, gets and clears at once."""
    kept: Kept[int] = Kept(50)

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
