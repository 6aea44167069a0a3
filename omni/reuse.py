"""What is kept between requests, so that it need not be made again: the values last used, bounded in bytes; and what
tensors are known by."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

V = TypeVar("V")

REUSE_BYTES = 2 * 2**30
"""Of what is kept, unless said otherwise. A minute of video at the largest size that the models see takes 210 MB."""


class LRUCache(Generic[V]):
    """Values by key, `limit` bytes of them at most: the least recently used goes first. Safe with threads.

    Values are shared with whoever asks: nobody may write to them. A limit of 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"what is kept may take 0 bytes or more, not {limit}.")
        self.limit = limit
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """None where it is not kept (any more)."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, nbytes: int) -> None:
        """Keeps a value that takes so many bytes, in place of the key's last; not one that alone exceeds the limit."""
        dropped = []  # freed outside of the lock: a tensor's end may run whatever refers to it
        with self._lock:
            if key in self._values:
                dropped.append(self._remove(key))
            if nbytes <= self.limit and self.limit > 0:
                self._values[key] = value, nbytes
                self._nbytes += nbytes
            while self._nbytes > self.limit:
                dropped.append(self._remove(next(iter(self._values))))

    def clear(self) -> None:
        with self._lock:
            dropped, self._values, self._nbytes = self._values, OrderedDict(), 0
        del dropped

    def _remove(self, key: Hashable) -> V:
        value, nbytes = self._values.pop(key)
        self._nbytes -= nbytes
        return value


PART_BYTES = 8 * 2**20
"""Of a tensor that one thread digests at a time."""


def digest_of(tensor: Tensor) -> bytes:
    """32 bytes that tell a tensor by its dtype, shape and content, on any device, by SHA-256.

    Remembered for as long as the tensor lives and is not written to, as far as its version tells: by operations of
    torch, not through memory that is shared with NumPy.
    """
    known = None if tensor.is_inference() else tensor._version  # inference tensors count no versions
    if known is not None:
        with _lock:
            found = _digests.get(tensor)
        if found is not None and found[0] == known:
            return found[1]
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())
    parts = [data[first : first + PART_BYTES] for first in range(0, len(data), PART_BYTES)]
    whole = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if len(parts) > 1:
        with ThreadPoolExecutor(min(8, len(parts), os.cpu_count() or 1)) as pool:
            digests = list(pool.map(_digest, parts))
    else:
        digests = list(map(_digest, parts))
    for digest in digests:
        whole.update(digest)
    if known is not None:
        with _lock:
            _digests[tensor] = known, whole.digest()
    return whole.digest()


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


_digests = WeakIdKeyDictionary()
_lock = Lock()
