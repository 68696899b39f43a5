"""The result store: one SQLite file per study, one row per episode, written as the episode ends.

WAL mode lets a report read while several evaluations write. WAL needs a local file system (not NFS).
"""

import csv
import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from vlm4vla.errors import UserError, nearest
from vlm4vla.files import replacing
from vlm4vla.types import EpisodeResult

SCHEMA_VERSION = 1
APPLICATION_ID = 0x564C4134
"""``VLA4`` in SQLite's header: tells a result store from any other database."""
BUSY_S = 60.0
SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, spec TEXT NOT NULL, status TEXT NOT NULL, data_hash TEXT NOT NULL,
    versions TEXT NOT NULL, seconds REAL NOT NULL, message TEXT NOT NULL, updated REAL NOT NULL
) STRICT;
CREATE TABLE episodes (
    run_id TEXT NOT NULL, protocol TEXT NOT NULL, episode INTEGER NOT NULL, seed INTEGER NOT NULL,
    success INTEGER CHECK (success IN (0, 1)), steps INTEGER NOT NULL, credits TEXT NOT NULL,
    instruction TEXT NOT NULL, timings TEXT NOT NULL, versions TEXT NOT NULL, fault TEXT,
    PRIMARY KEY (run_id, protocol, episode)
) STRICT;
"""
PROTOCOLS = "CREATE TABLE IF NOT EXISTS protocols (name TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT"
"""Not part of the first stores, and added where it is missing: older versions do not mind."""
Status = Literal["planned", "training", "trained", "done", "failed"]
COLUMNS = tuple(f.name for f in fields(EpisodeResult))
JSON_COLUMNS = ("credits", "timings", "versions")


@dataclass(frozen=True)
class RunRow:
    """What is known about a run beside its episodes."""

    run_id: str
    spec: dict[str, Any] = field(default_factory=dict)
    status: Status = "planned"
    data_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent on recording, training and evaluation, over all starts of the run that ended by themselves."""
    message: str = ""
    """Why it failed."""
    updated: float = 0.0
    """Unix time."""


UNWRITABLE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""What SQLite says of a disk or folder, as the system says it (``errors.mendable`` knows what to do then)."""
ROOM = 1 << 16
"""Bytes without which a disk counts as full: SQLite's index of the WAL takes 32 KiB at once, and its files some more.
Where these do not fit, SQLite speaks of an I/O error."""


class Store:
    """Opens ``path``, creating it where it does not exist. Not to be shared between threads.

    Raises:
        UserError: the file is damaged, of another kind, or of another version.
        OSError: it cannot be written (so do all methods that write).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing():
            self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            with self._writing():
                self._open()
        except BaseException as error:
            self._db.close()
            if _code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise self._damaged(str(error)) from error
            raise

    def _open(self) -> None:
        with self._transaction():
            kind, version = self._pragma("application_id"), self._pragma("user_version")
            empty = not self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if empty:
                for statement in SCHEMA.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif kind != APPLICATION_ID:
                raise UserError(f"{self.path}, another program's SQLite file", "a result store", "name another file")
            elif version != SCHEMA_VERSION:
                raise UserError(
                    f"{self.path} with schema version {version}",
                    f"schema version {SCHEMA_VERSION}",
                    "read it with the vlm4vla version that wrote it, or name another file",
                )
        if not empty and (problem := self._pragma("quick_check")) != "ok":
            raise self._damaged(problem)
        # Switching the mode does not wait for other processes by itself.
        give_up = time.monotonic() + BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
        # In WAL mode this survives the death of any process; a power cut may cost the last rows.
        self._db.execute("PRAGMA synchronous = NORMAL")

    def _damaged(self, problem: str) -> UserError:
        return UserError(
            f"{self.path} is no result store: {problem}",
            "a whole SQLite file written by vlm4vla",
            f"restore a copy, or move it away and evaluate again: mv {self.path} {self.path}.damaged",
        )

    def _pragma(self, name: str) -> Any:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if (number := UNWRITABLE.get(_code(error))) is None:
                raise
            disk = os.statvfs(self.path.parent)
            if number == errno.EIO and disk.f_bavail * disk.f_frsize < ROOM:
                number = errno.ENOSPC
            raise OSError(number, os.strerror(number), str(self.path)) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._writing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------ episodes

    def add(self, run_id: str, result: EpisodeResult) -> None:
        """Store an episode. It replaces a fault of the same episode, never a finished one."""
        values = {name: getattr(result, name) for name in COLUMNS}
        values |= {name: json.dumps(values[name], sort_keys=True) for name in JSON_COLUMNS}
        if result.success is not None:
            values["success"] = int(result.success)
        with self._writing():
            self._db.execute(
                f"INSERT INTO episodes (run_id, {', '.join(COLUMNS)}) VALUES (:run_id, :{', :'.join(COLUMNS)}) "
                f"ON CONFLICT DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in COLUMNS)} WHERE success IS NULL",
                {"run_id": run_id, **values},
            )

    def results(self, run_id: str, protocol: str) -> list[EpisodeResult]:
        """Episodes of a run under a protocol in their order, faults included."""
        rows = self._db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM episodes WHERE run_id = ? AND protocol = ? ORDER BY episode",
            (run_id, protocol),
        )
        return [_result(row) for row in rows]

    def evaluated(self) -> list[tuple[str, str, int, int]]:
        """``(run_id, protocol, finished episodes, faults)`` of everything that was evaluated."""
        return self._db.execute(
            "SELECT run_id, protocol, count(success), count(*) - count(success) FROM episodes "
            "GROUP BY run_id, protocol ORDER BY run_id, protocol"
        ).fetchall()

    def finished(self, run_id: str, protocol: str, episodes: int) -> int:
        """How many of the episodes 0 .. ``episodes`` - 1 are finished."""
        return self._db.execute(
            "SELECT count(success) FROM episodes WHERE run_id = ? AND protocol = ? AND episode < ?",
            (run_id, protocol, episodes),
        ).fetchone()[0]

    # ----------------------------------------------------------------------------------------------------- protocols

    def declare(self, protocol: str, definition: dict[str, Any]) -> None:
        """Keep what a protocol's name means. Raises ``UserError`` where it meant something else here."""
        text = json.dumps(definition, sort_keys=True)
        with self._transaction():
            self._db.execute(PROTOCOLS)
            self._db.execute("INSERT OR IGNORE INTO protocols VALUES (?, ?)", (protocol, text))
            kept = self._db.execute("SELECT definition FROM protocols WHERE name = ?", (protocol,)).fetchone()[0]
        if kept != text:
            raise UserError(
                f"{protocol} as {text}",
                f"what {self.path} was evaluated with: {kept}",
                "name another file: --store FILE; or evaluate with the vlm4vla version that wrote it",
            )

    def protocols(self) -> dict[str, dict[str, Any]]:
        """The protocols declared here by name."""
        with self._transaction():
            self._db.execute(PROTOCOLS)
            rows = self._db.execute("SELECT name, definition FROM protocols ORDER BY name").fetchall()
        return {name: json.loads(text) for name, text in rows}

    # ---------------------------------------------------------------------------------------------------------- runs

    def set_run(self, run_id: str, **changes: Any) -> None:
        """Create or change a run's row; ``changes`` are fields of ``RunRow``."""
        known = [f.name for f in fields(RunRow) if f.name not in ("run_id", "updated")]
        for name in changes:
            if name not in known:
                raise ValueError(f"no field {name!r} of a run (nearest: {nearest(name, known)})")
        if changes.get("status", "planned") not in get_args(Status):
            raise ValueError(f"status {changes['status']!r}, not among {get_args(Status)}")
        with self._transaction():
            row = self.runs().get(run_id, RunRow(run_id))
            values = {name: changes.get(name, getattr(row, name)) for name in known}
            values |= {name: json.dumps(values[name], sort_keys=True) for name in ("spec", "versions")}
            self._db.execute(
                "INSERT OR REPLACE INTO runs VALUES "
                "(:run_id, :spec, :status, :data_hash, :versions, :seconds, :message, :updated)",
                {"run_id": run_id, **values, "updated": time.time()},
            )

    def runs(self) -> dict[str, RunRow]:
        """All runs by id, in the order of their ids."""
        rows = self._db.execute(
            "SELECT run_id, spec, status, data_hash, versions, seconds, message, updated FROM runs ORDER BY run_id"
        )
        return {r[0]: RunRow(r[0], json.loads(r[1]), r[2], r[3], json.loads(r[4]), *r[5:]) for r in rows}

    # -------------------------------------------------------------------------------------------------------- export

    def export(self, path: Path | str) -> None:
        """Write all episodes to ``.csv`` or ``.parquet``; JSON columns become one column per key (``timings.sim``).

        Raises:
            UserError: another suffix.
        """
        path = Path(path)
        if path.suffix not in (".csv", ".parquet"):
            raise UserError(f"export to {path}", "a name that ends in .csv or .parquet", "name another file")
        rows = []
        for run_id, protocol, *_ in self.evaluated():
            for result in self.results(run_id, protocol):
                row: dict[str, Any] = {"run_id": run_id}
                for name in COLUMNS:
                    value = getattr(result, name)
                    row |= {f"{name}.{key}": v for key, v in value.items()} if name in JSON_COLUMNS else {name: value}
                rows.append(row)
        plain = ["run_id", *(name for name in COLUMNS if name not in JSON_COLUMNS)]
        columns = plain + sorted({name for row in rows for name in row} - set(plain))
        with replacing(path) as partial:
            if path.suffix == ".csv":
                with partial.open("w", newline="") as file:
                    writer = csv.DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(rows)
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), partial)


def _code(error: BaseException) -> int:
    """Of which kind an error of SQLite's is, without the details in the higher bytes; 0 of others."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _result(row: tuple) -> EpisodeResult:
    values = dict(zip(COLUMNS, row, strict=True))
    values |= {name: json.loads(values[name]) for name in JSON_COLUMNS}
    if values["success"] is not None:
        values["success"] = bool(values["success"])
    return EpisodeResult(**values)
