"""The result store: what is written comes back, and a damaged file is told."""

import csv
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from vlm4vla.errors import UserError, mendable
from vlm4vla.studies.store import Store
from vlm4vla.types import EpisodeResult


def episode(number, success=True, **changes):
    values = {
        "protocol": "fake/v1",
        "episode": number,
        "seed": 100 + number,
        "success": success,
        "steps": 7,
        "credits": {"execution": True, "recognition": None},
        "instruction": "place it on the 😀 card",
        "timings": {"sim": 0.25, "wall": 1.5},
        "versions": {"numpy": "2.0"},
        "fault": None if success is not None else "it crashed",
    }
    return EpisodeResult(**(values | changes))


def test_episodes_come_back_equal(tmp_path):
    rows = [episode(0), episode(1, False), episode(2, None)]
    with Store(tmp_path / "r.sqlite") as store:
        for row in reversed(rows):
            store.add("run", row)
    with Store(tmp_path / "r.sqlite") as store:
        assert store.results("run", "fake/v1") == rows
        assert store.evaluated() == [("run", "fake/v1", 2, 1)]
        assert store.results("run", "other/v1") == store.results("other", "fake/v1") == []


def test_a_finished_episode_is_never_overwritten_and_a_fault_is(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.add("run", episode(0, None))
        store.add("run", episode(0, False))
        store.add("run", episode(0, True))
        store.add("run", episode(0, None))
        assert store.results("run", "fake/v1") == [episode(0, False)]


def test_runs_change_field_by_field(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.set_run("b", spec={"seed": 1})
        store.set_run("b", status="trained", seconds=2.5, data_hash="abc")
        store.set_run("a")
        assert list(store.runs()) == ["a", "b"]
        row = store.runs()["b"]
        assert (row.spec, row.status, row.seconds, row.data_hash) == ({"seed": 1}, "trained", 2.5, "abc")
        with pytest.raises(ValueError, match="status"):
            store.set_run("b", status="finished")
        with pytest.raises(ValueError, match="nearest: seconds"):
            store.set_run("b", second=1)
        assert store.runs()["b"] == row


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told_as_such(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        full = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {full}")
        writes = (lambda i: store.add("a", episode(i)), lambda i: store.declare(str(i), {"rule": "x" * 500}))
        for write in writes:
            with pytest.raises(OSError, match="No space left") as refused:
                [write(i) for i in range(1000)]
            assert "free some space" in mendable(refused.value).next_step
        assert len(store.results("a", "fake/v1")) < 1000, "what fitted is kept"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"Permission denied.*folder") as refused:
        Store(tmp_path / "folder")
    assert "another folder" in mendable(refused.value).next_step


@pytest.mark.parametrize(
    ("left", "said", "mend"), [(1 << 14, "No space left", "free some space"), (1 << 30, "Input/output", "local disk")]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_whole_store_without_room_is_not_told_as_damaged(tmp_path, monkeypatch, there, left, said, mend):
    """A limit of files' sizes stands for the disk: SQLite cannot make its index of the WAL, an I/O error to it."""
    path = tmp_path / "r.sqlite"
    if there:
        Store(path).close()
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=left, f_frsize=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match=said) as refused, Store(path) as store:  # a new one's index comes later
            store.add("a", episode(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mend in mendable(refused.value).next_step
    with Store(path) as store:
        store.add("a", episode(0))


@pytest.mark.parametrize("kind", ["text", "truncated", "overwritten", "foreign", "newer"])
def test_what_is_no_store_is_told(tmp_path, kind):
    path = tmp_path / "r.sqlite"
    if kind == "text":
        path.write_text("run_id,success\n" * 500)
    elif kind == "foreign":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE photos (name TEXT)")
    else:
        with Store(path) as store:
            for number in range(200):
                store.add("run", episode(number))
        data = bytearray(path.read_bytes())
        if kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif kind == "overwritten":
            data[8192:16384] = b"\xff" * 8192
            path.write_bytes(data)
        else:
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        Store(path)
    assert "r.sqlite" in str(caught.value)
    assert path.read_bytes() == before


WRITER = """
import sys
from pathlib import Path
from test_store import episode
from vlm4vla.studies.store import Store
with Store(sys.argv[1]) as store:
    for number in range(150):
        store.add(sys.argv[2], episode(number))
        store.set_run(sys.argv[2], seconds=float(number))
        store.set_run("shared", **{"message": sys.argv[2]})
"""


def test_processes_write_at_once_from_the_first_moment(tmp_path):
    path = tmp_path / "r.sqlite"
    names = ["a", "b", "c"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], cwd=Path(__file__).parent, stderr=subprocess.PIPE
        )
        for name in names
    ]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors.decode()
    with Store(path) as store:
        assert store.evaluated() == [(name, "fake/v1", 150, 0) for name in names]
        assert {name: store.runs()[name].seconds for name in names} == dict.fromkeys(names, 149.0)


def test_export(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.add("a", episode(0, credits={"execution": False}))
        store.add("b", episode(1, None))
        store.export(tmp_path / "r.csv")
        store.export(tmp_path / "r.parquet")
        with pytest.raises(UserError, match=r"r\.xlsx"):
            store.export(tmp_path / "r.xlsx")
    with (tmp_path / "r.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["run_id"], r["success"], r["credits.execution"], r["timings.wall"]) for r in table] == [
        ("a", "True", "False", "1.5"),
        ("b", "", "True", "1.5"),
    ]
    parquet = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [r["success"] for r in parquet] == [True, None]
    assert [r["credits.execution"] for r in parquet] == [False, True]
    assert parquet[1]["fault"] == "it crashed"
    assert parquet[0]["instruction"] == "place it on the 😀 card"
