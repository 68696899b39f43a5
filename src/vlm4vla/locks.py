"""One process at a time: file locks that the kernel lets go of when their holder ends, however it ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm4vla.errors import UserError


@contextmanager
def locked(path: Path, what: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path``, in which the holder's process id is written; its folder is made.

    Args:
        what: is worked on under this lock, in words.
        patience_s: how long to wait for another holder.

    Raises:
        UserError: another process still holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + patience_s
    with path.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    lock.seek(0)
                    raise UserError(
                        f"another process at work on this {what} (process {lock.read() or 'unknown'} holds {path})",
                        "one process at a time",
                        "wait for it, or end it and run this again",
                    ) from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
