"""Files and folders that are whole or absent: written under another name, synced, renamed. And where the cache is."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

FEW = 3
"""So many folders are named where none is like the one that was asked for."""


def cache() -> Path:
    """Where what can be fetched again lies: ``$VLM4VLA_CACHE``, else ``$XDG_CACHE_HOME/vlm4vla``, else
    ``~/.cache/vlm4vla``; ``~`` is the home folder in each, and an empty variable is none."""
    if own := os.environ.get("VLM4VLA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm4vla"


def stays_inside(name: str) -> bool:
    """Whether a path that a data set names stays below the folder that it starts from. It goes by the name: links
    inside the folder are its owner's, and may lead elsewhere."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def there(path: Path) -> Path:
    """What there is of the way to ``path``, which leads nowhere."""
    return next(parent for parent in path.parents if parent.is_dir())


def beside(path: Path) -> str:
    """What a path which leads nowhere may have meant: `` (nearest in runs: mine, demo)``, or nothing."""
    place = there(path)
    folders = [other for other in place.iterdir() if other.is_dir() and not other.name.startswith(".")]
    others = sorted(folder.name for folder in folders if folder.suffix != ".locks")  # a result store's
    close = get_close_matches(path.relative_to(place).parts[0], others, n=3)
    if not close and len(others) <= FEW:
        close = others
    return f" (nearest in {place}: {', '.join(close)})" if close else ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well: ``path`` is whole or absent, never partial.

    Its name holds the machine and the process, so that several may write ``path`` at once (the last one stays); what a
    process of this machine left when it was killed is removed by the next one that writes ``path``.
    """
    mark = f".{path.name}.{socket.gethostname()}."
    for old in path.parent.glob(f"{_literal(mark)}*.partial"):
        process = old.name.removeprefix(mark).removesuffix(".partial")
        if process.isdecimal() and not _alive(int(process)):
            old.unlink(missing_ok=True)
    partial = path.with_name(f"{mark}{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without a name
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary empty folder that takes the place of ``path`` when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in partial.rglob("*"):
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without a name
        raise


def write_text(path: Path, text: str) -> None:
    """``path`` with this text in UTF-8, whole or as it was."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _literal(name: str) -> str:
    """``name`` as a glob pattern that only it matches."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
