"""Encoding clips while they are read.

Two threads. Whoever prepares a request reads its files, and says of each clip how many frames are there (`tell`);
another encodes them as they come, one batch of temporal grids after the other, and at the end keeps what came of a clip
where the prefill looks for it. Frames are not queued: they are the request's, which holds all of them in any case. So
reading never waits for encoding, and what is handed over is a number.

Nothing depends on it. A clip that turns out damaged and is read again is told of as another, with other frames: what
was encoded of the first is dropped. Where reading fails or is interrupted, encoding ends with the batch in hand. Where
the device has too little memory, nothing is kept; the prefill encodes whatever it does not find.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType

import torch

from omni.encoders.received import joined
from omni.encoders.vision import grid_batches
from omni.engine import Encoded, Engine
from omni.inputs import Medium
from omni.processing.frames import Pixels
from seats.method import Method


def can_encode_ahead(engine: Engine) -> bool:
    """Whether there is a device that would wait otherwise, and a place for what is encoded. On a CPU the cores that
    would encode are those that read."""
    return engine.device.type != "cpu" and engine.reuses


@dataclass
class _Clip:
    """there: how many of its frames; dropped: whether no more will come."""

    pixels: Pixels
    there: int = 0
    dropped: bool = False


class BackgroundEncoder:
    """with BackgroundEncoder(engine, method) as ahead: … ahead.tell(pixels, frames) …

    method: that the clips are encoded for, None where every token stays. The block ends when all that was told of is
    encoded, or, where it is left by an error, at once.
    """

    def __init__(self, engine: Engine, method: Method | None) -> None:
        self.engine = engine
        self.needs = None if method is None or method.keeps_everything else method.needs
        self.clips: deque[_Clip] = deque()
        self.latest: _Clip | None = None
        self.over = self.stopped = False
        self.error: Exception | None = None
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="encoding ahead", daemon=True)

    def __enter__(self) -> BackgroundEncoder:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.changed:
            self.over, self.stopped = True, kind is not None
            self.changed.notify()
        try:
            self.thread.join()
        except BaseException:  # an interrupt
            self.stopped = True
            raise
        if self.error is not None and error is None:
            raise self.error

    def tell(self, pixels: Pixels, there: int) -> None:
        """pixels: of one clip, of which so many frames are there, the first ones."""
        with self.changed:
            if self.latest is None or self.latest.pixels.frames[0] is not pixels.frames[0]:
                if self.latest is not None:
                    self.latest.dropped = True  # unless it is complete
                self.latest = _Clip(pixels)
                self.clips.append(self.latest)
            self.latest.there = there
            self.changed.notify()

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.clips or self.over)
                    if self.stopped or not self.clips:
                        return
                    clip = self.clips.popleft()
                self._encode(clip)
        except MemoryError:
            return
        except Exception as error:
            self.error = error

    def _encode(self, clip: _Clip) -> None:
        vision, pixels, frames = self.engine.thinker.vision, clip.pixels, len(clip.pixels.frames[0])
        medium = Medium("video", pixels, pixels.grid_thw)
        ((grids, height, width),) = medium.size.tolist()
        step = pixels.sizes.temporal_patch_size
        config, dtype = self.engine.thinker.config.vision, self.engine.thinker.embedding.weight.dtype
        count = grids * height * width // config.spatial_merge_size**2 * (1 + len(config.deepstack_blocks))
        if count * config.out_hidden_size * dtype.itemsize > self.engine.kept.limit:
            return  # it would not be kept, and be encoded once more
        if clip.there == frames and self.engine.encoded(medium.digest(), self.needs) is not None:
            return
        pieces = []
        walk = vision.walk(pixels, [[grids, height, width]], self.needs, self.engine.call)
        encoded = 0
        for batch in grid_batches(grids, height * width, step, self.engine.device):
            encoded += batch
            if not self._waited(clip, min(encoded * step, frames)):
                return
            with self.engine.running():  # others have their turn between two batches
                pieces.append(next(walk))
        tokens, signals = zip(*pieces, strict=True)
        with self.engine.running():
            made = Encoded(self.needs, torch.cat(tokens, dim=1), joined(signals))
        self.engine.kept.put(medium.digest(), made, made.nbytes)

    def _waited(self, clip: _Clip, frames: int) -> bool:
        """Waits for so many frames of a clip; whether they have come."""
        with self.changed:
            self.changed.wait_for(lambda: clip.there >= frames or clip.dropped or self.over)
            return clip.there >= frames and not self.stopped
