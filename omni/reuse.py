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

    Remembered for as long as the tensor, or what it is a view of, lives and is not written to, as far as its version
    tells: by operations of torch, not through memory that is shared with NumPy.
    """
    # Inference tensors count no versions. A view, which is another object each time it is taken, shares its base's.
    known = None if tensor.is_inference() else tensor._version
    owner = tensor if tensor._base is None else tensor._base
    view = tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(), tensor.is_neg()
    if known is not None:
        with _lock:
            version, digests = _digests.get(owner, (known, {}))
            if version == known and view in digests:
                return digests[view]
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())
    parts = [data[first : first + PART_BYTES] for first in range(0, len(data), PART_BYTES)]
    whole = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if len(parts) > 1:
        with ThreadPoolExecutor(min(8, len(parts), os.cpu_count() or 1)) as pool:
            of_parts = list(pool.map(_digest, parts))
    else:
        of_parts = list(map(_digest, parts))
    for digest in of_parts:
        whole.update(digest)
    if known is not None:
        with _lock:
            version, digests = _digests.get(owner, (known, {}))
            _digests[owner] = known, {**(digests if version == known else {}), view: whole.digest()}
    return whole.digest()


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


_digests = WeakIdKeyDictionary()
"""Of tensors that are no views: their version, and by view digests of what they hold at that."""
_lock = Lock()
