"""Files that are whole or absent, whoever is killed."""

import contextlib
import errno
import os
import socket
import subprocess
import sys

import pytest

from vlm4vla.data import hub
from vlm4vla.errors import mendable
from vlm4vla.files import new_folder, replacing, write_text
from vlm4vla.sims import environments


def test_the_file_appears_whole_and_nothing_else_stays(tmp_path):
    write_text(tmp_path / "a.txt", "ä")
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="partial"), replacing(path):
        pass  # nothing was written
    with contextlib.suppress(RuntimeError), replacing(path) as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(tmp_path / "a.txt") in str(mendable(caught.value))


def test_a_full_disk_is_told_with_the_folder(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, new_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(tmp_path / "a") in str(mendable(caught.value))


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    """Only that of this file and of processes that are no more."""
    path = tmp_path / "a[1]*.txt"
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from vlm4vla.files import replacing
        with replacing(Path(sys.argv[1])) as partial:
            partial.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for target in (path, tmp_path / "b.txt"):
        assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode != 0
    alive = tmp_path / f".{path.name}.{socket.gethostname()}.{os.getppid()}.partial"
    elsewhere = tmp_path / f".{path.name}.another-host.1.partial"
    for other in (alive, elsewhere):
        other.touch()
    assert len(list(tmp_path.iterdir())) == 4
    write_text(path, "whole")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert path.name in left
    assert len(left) == 4
    assert alive.exists()
    assert elsewhere.exists()
    assert any(name.startswith(".b.txt.") for name in left)


@pytest.mark.parametrize(
    ("own", "xdg", "where"),
    [
        (None, None, "home/.cache/vlm4vla"),
        ("", "", "home/.cache/vlm4vla"),
        ("~/mine", "elsewhere", "home/mine"),
        ("", "~/xdg", "home/xdg/vlm4vla"),
    ],
)
def test_everything_that_is_fetched_lies_in_one_cache(tmp_path, monkeypatch, own, xdg, where):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in {"VLM4VLA_CACHE": own, "XDG_CACHE_HOME": xdg}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert environments.folder("libero") == tmp_path / where / "sims" / "libero"
    assert hub.place("lab/demos", "") == tmp_path / where / "datasets" / "lab--demos"
