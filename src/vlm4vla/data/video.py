"""MP4 files of many episodes (``sims.film.Film`` writes them), read frame by frame. PyAV. T frames, B wanted ones."""

import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from vlm4vla.data.layout import damaged
from vlm4vla.errors import UserError

TOLERANCE = 0.1
"""A frame may lie this share of a frame's duration beside its time: files round to their own clock."""
READ_ON = 2
"""A wanted frame at most so many frames ahead is reached by decoding on, without a seek: as many as a seek costs."""
OPEN_FILES = 32


def decode(path: Path, times: np.ndarray, fps: float, size: tuple[int, int]) -> np.ndarray:
    """The frames at ``times`` (B,) seconds, in any order: uint8 (B, height, width, 3). Only what they need is decoded.

    Raises:
        UserError: no such file, damaged, frames of another size, or no frame at one of the times.
    """
    pictures = np.empty((len(times), *size, 3), np.uint8)
    try:
        about = path.stat()
        # One decoder a process and thread: they share no position in a file. A file that was replaced is another one.
        reader = _open(path, (about.st_ino, about.st_mtime_ns), os.getpid(), threading.get_ident())
        for place in np.argsort(times, kind="stable"):
            picture = reader.at(float(times[place]), fps)
            if picture.shape != (*size, 3):
                raise damaged(path, f"pictures of {picture.shape[:2]}", f"{size} as in meta/info.json")
            pictures[place] = picture
    except FileNotFoundError as error:
        raise damaged(path, "no such file", "an MP4 file") from error
    except av.error.FFmpegError as error:
        _open.cache_clear()
        raise damaged(path, f"damaged ({error})", "a whole MP4 file") from error
    return pictures


class _Reader:
    """An opened MP4 and where its decoder stands."""

    def __init__(self, path: Path):
        self.path = path
        self.container: Any = av.open(str(path), format="mp4")  # no playlist, which names other files
        if not self.container.streams.video:
            raise damaged(path, "no video in it", "an MP4 file with pictures")
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.to_rgb = VideoReformatter()
        self.frames: Any = iter(())
        self.time, self.picture = -np.inf, np.empty((0, 0, 3), np.uint8)
        """The last decoded frame's time, and that frame where it was asked for."""

    def at(self, time: float, fps: float) -> np.ndarray:
        """The frame at ``time`` seconds, (height, width, 3)."""
        slack = TOLERANCE / fps
        if abs(self.time - time) > slack or not len(self.picture):
            frame = self._find(time, slack, READ_ON / fps)
            self.picture = self.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return self.picture

    def _find(self, time: float, slack: float, ahead: float) -> Any:
        if not self.time + slack < time <= self.time + ahead:
            self._seek(time)
        tried = False
        self.picture = np.empty((0, 0, 3), np.uint8)
        while True:
            frame = next(self.frames, None)
            if frame is None:
                raise self._wrong(f"no frame at {time:.3f} s; it ends at {self.time:.3f} s")
            self.time = frame.time
            if abs(self.time - time) <= slack:
                return frame
            if self.time > time:
                # With B-frames a seek may land behind its target: once more, from a second before.
                if tried:
                    raise self._wrong(f"no frame at {time:.3f} s, but one at {self.time:.3f} s")
                tried = True
                self._seek(max(0.0, time - 1.0))

    def _seek(self, time: float) -> None:
        self.container.seek(round(time / self.stream.time_base), stream=self.stream, backward=True)
        self.frames, self.time = self.container.decode(self.stream), -np.inf

    def _wrong(self, found: str) -> UserError:
        return damaged(self.path, found, "frames at the fps of meta/info.json")


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path, version: tuple[int, int], process: int, thread: int) -> _Reader:
    return _Reader(path)
