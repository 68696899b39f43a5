"""What the makers of data sets share (``record.py``, ``convert/``): whose an unfinished or finished folder is, and
processes that may die. What is made is named by one word: ``recording``, ``conversion``."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vlm4vla.data.layout import OWN_KEY
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.files import write_text
from vlm4vla.sims.worker import start_pool_process


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
