"""What the makers of data share (``record.py``, ``convert/``, ``skills/conversations.py``): a folder is made once, the
unfinished and the finished one are somebody's, and processes may die. A word names what is made: ``recording``."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from vlm4vla.data.layout import OWN_KEY
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.files import write_text
from vlm4vla.locks import locked
from vlm4vla.sims.worker import start_pool_process

Made = TypeVar("Made")


def once(folder: Path, work: Path, what: str, make: Callable[[], None], look: Callable[[], Made]) -> Made:
    """``look`` at ``folder``, after ``make`` made it in ``work`` where it is not there; then ``work`` is removed.

    Args:
        what: for the message to the second of two processes.
        look: raises ``UserError`` where ``folder`` is something else.

    Raises:
        UserError: another process makes it.
    """
    if folder.exists() and not work.exists():
        return look()
    with locked(work / "lock", what):
        if not folder.exists():
            make()
        made = look()
        shutil.rmtree(work)
    return made


def begin(partial: Path, what: str, identity: dict[str, Any]) -> None:
    """The unfinished folder ``partial`` belongs to ``identity``; a new one says so in ``<what>.json``.

    Raises:
        UserError: it is the beginning of something else.
    """
    path = partial / f"{what}.json"
    if not path.exists():
        write_text(path, json.dumps(identity, indent=4))
    elif json.loads(path.read_text()) != identity:
        raise UserError(
            f"{partial}, the beginning of another {what} (see {path.name})",
            "the same source, settings and version",
            f"name another folder, or: rm -r {partial}",
        )


def finished(folder: Path, what: str, identity: dict[str, Any]) -> tuple[Dataset, dict[str, Any]]:
    """The data set ``folder``, which is what ``identity`` says, and its provenance.

    Raises:
        UserError: it is another one.
    """
    dataset = Dataset.open(folder)
    provenance = dataset.info.get(OWN_KEY, {}).get("provenance", {})
    if provenance.get(what) != identity:
        raise UserError(
            f"{folder}, another data set (see: vlm4vla data inspect {folder})",
            f"no folder, or the same {what}",
            f"name another folder, or: rm -r {folder}",
        )
    return dataset, provenance


@contextmanager
def processes(workers: int, what: str) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with this one.

    Raises:
        UserError: one of them died.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_pool_process, (os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"a {what} process died",
            "processes that live (is memory short?)",
            "run the same command again, perhaps with fewer workers; what is finished is kept",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
