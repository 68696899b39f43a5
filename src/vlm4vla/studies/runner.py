"""Runs a study: records, trains and evaluates what is missing, and nothing twice.

    <folder>/study.yaml      results.sqlite      data/<hash of DataSpec>/
             runs/<run id>/  policy/ policies/step-*/ metrics.jsonl strips/ log.txt

Each stage resumes by itself, so killing any process at any time and running the study again continues it. A cell that
fails does not stop the others. With ``jobs`` > 1 each cell is a process of its own.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from vlm4vla.audit import Audit, require_declared
from vlm4vla.errors import UserError
from vlm4vla.evaluation.faults import require_decided
from vlm4vla.evaluation.rollout import evaluate
from vlm4vla.files import write_text
from vlm4vla.locks import locked
from vlm4vla.metrics import read_metrics
from vlm4vla.sims import protocols
from vlm4vla.sims.worker import exit_with_parent
from vlm4vla.spec import DataSpec, Runtime, SourceSpec, content_hash, load_yaml
from vlm4vla.studies.matrix import RESULTS, Cell, Study, curve_id, curve_steps, load, plan
from vlm4vla.studies.store import Store

STRIPS = 12
"""Episodes per protocol of which a film strip is kept."""
ORPHAN_S = 10.0
"""Processes of a runner that was killed end within a second or two (``exit_with_parent``); wait for them so long."""
POLL_S = 0.5
MESSAGE_SIZE = 2000
UNWRITABLE = (OSError, sqlite3.Error, UserError)
"""A failure that cannot be written down (a full disk may be its cause) is still told, and harms no other cell."""


@dataclass(frozen=True)
class Failure:
    """Why a cell did not finish."""

    run_id: str
    message: str
    log: Path


def run(study: Study, folder: Path, runtime: Runtime | None = None, jobs: int = 1) -> None:
    """Run what ``study`` still needs in ``folder``; ``jobs`` cells at a time.

    Raises:
        UserError: at the end, naming the cells that failed and their logs; at once, where ``folder`` belongs to another
            study, holds policies of other weights or demonstrations than are here now, or another process runs it.
    """
    runtime = runtime or Runtime()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", "study", ORPHAN_S):
        _write_study(study, folder)
        rows = plan(study, folder).rows
        cells = {row.cell.run_id: row.cell for row in rows if row.status != "done"}
        with Store(folder / RESULTS) as store:
            known = store.runs()
            for row in rows:
                run_id, spec = row.cell.run_id, row.cell.run.model_dump(mode="json")
                if run_id not in known:
                    store.set_run(run_id, spec=spec)
                elif row.status == "done" and row.run != "done":  # killed after the last episode
                    store.set_run(run_id, status="done", message="")
        failures = _record(cells, folder, runtime)
        _check_content(study.cells(), folder)
        if cells:
            require_declared(audits(study, folder), study.varied, study.differs)
        ready = [cell for run_id, cell in cells.items() if run_id not in {f.run_id for f in failures}]
        failures += (_run_here if jobs == 1 else _run_apart)(ready, folder, runtime, jobs)
    if failures:
        listed = "".join(f"\n  {f.run_id}: {f.message.splitlines()[0]} (log: {f.log})" for f in failures)
        raise UserError(
            f"{len(failures)} of {len(study.cells())} cells did not finish:{listed}",
            "finished cells (the others are kept and not repeated)",
            "read the logs, mend the cause and run the study again",
        )


def run_cell(cell: Cell, folder: Path, runtime: Runtime) -> None:
    """Train and evaluate one cell whose data is there.

    Raises ``UserError`` where episodes remain undecided for the infrastructure's reasons, and whatever a stage raises.
    """
    out = run_folder(folder, cell.run_id)
    started = time.monotonic()
    with locked(out / "lock", "run", ORPHAN_S), Store(folder / RESULTS) as store:
        before = store.runs()[cell.run_id].seconds if cell.run_id in store.runs() else 0.0
        try:
            if not (out / "policy").is_dir():
                from vlm4vla.training.imitation import train

                store.set_run(cell.run_id, spec=cell.run.model_dump(mode="json"), status="training", message="")
                train(cell.run, data_folder(cell.run.data, folder), out, runtime)
            card = json.loads((out / "policy" / "policy.json").read_text())["card"]
            store.set_run(
                cell.run_id, status="trained", message="", data_hash=card["data_hash"], versions=card["versions"]
            )
            _evaluate_cell(cell, out, store, runtime)
            store.set_run(cell.run_id, status="done")
        except Exception as error:
            with contextlib.suppress(*UNWRITABLE):
                store.set_run(cell.run_id, status="failed", message=_words(error)[:MESSAGE_SIZE])
            raise
        finally:
            with contextlib.suppress(*UNWRITABLE):
                store.set_run(cell.run_id, seconds=before + time.monotonic() - started)


def run_folder(folder: Path, run_id: str) -> Path:
    """Where a run lives in a study's folder."""
    return folder / "runs" / run_id


def data_folder(data: DataSpec, folder: Path) -> Path:
    """Where a run's demonstrations are: cells with the same ``DataSpec`` share a recording, whatever is beside it."""
    if data.folder:
        return Path(data.folder)
    return folder / "data" / content_hash(data.model_dump(mode="json", exclude={"mixture"}))


def _evaluate_cell(cell: Cell, out: Path, store: Store, runtime: Runtime) -> None:
    folders = {cell.run_id: out / "policy"}
    folders |= {curve_id(cell.run_id, s): out / "policies" / f"step-{s:06d}" for s in curve_steps(cell.run)}
    policy, loaded = None, ""
    done = []
    for run_id, name, episodes in cell.wanted():
        if store.finished(run_id, name, episodes) == episodes:
            continue
        if policy is None or loaded != run_id:
            import torch

            from vlm4vla.policy import Policy, torch_device

            torch.set_num_threads(runtime.threads)
            device = torch_device(runtime.device)
            policy, loaded = Policy.load(folders[run_id]).for_acting(device), run_id
        done += evaluate(
            policy,
            protocols.protocol(name),
            episodes,
            store,
            run_id,
            image_size=policy.image_size,
            workers=runtime.workers,
            progress=runtime.progress,
            strips=out / "strips" if run_id == cell.run_id else None,
            num_strips=STRIPS,
        )
    require_decided(done, store.path.name, "run the study again: only these are repeated")


def _record(cells: dict[str, Cell], folder: Path, runtime: Runtime) -> list[Failure]:
    """Record the demonstrations that the untrained cells need, each once."""
    failures = []
    wanted: dict[Path, list[Cell]] = {}
    for run_id, cell in cells.items():
        if not (run_folder(folder, run_id) / "policy").is_dir() and cell.run.data.folder is None:
            wanted.setdefault(data_folder(cell.run.data, folder), []).append(cell)
    for target, users in wanted.items():
        from vlm4vla.data.record import record

        try:
            record(users[0].run.data, target, runtime.workers, runtime.progress)
        except Exception as error:
            for cell in users:
                failures.append(_failed(cell, folder, f"recording failed: {_words(error)}"))
    return failures


def _check_content(cells: list[Cell], folder: Path) -> None:
    """Policies in ``folder`` are of the weights and demonstrations that are here now: a run id holds their names only.

    Demonstrations that were removed since, or whose mixture lost a source, are not compared.
    """
    trained = [cell for cell in cells if (run_folder(folder, cell.run_id) / "policy").is_dir()]
    if not trained:
        return
    from vlm4vla.backbones.load import load_vlm
    from vlm4vla.backbones.vlm import parameters_hash
    from vlm4vla.data.sources import Sources

    backbones = {name: parameters_hash(load_vlm(name)[0]) for name in {cell.run.backbone for cell in trained}}
    specs = {(data_folder(cell.run.data, folder), cell.run.data.mixture): cell.run.data for cell in trained}
    data = {key: Sources.open(spec, key[0]).content_hash for key, spec in specs.items() if _there(*key)}
    for cell in trained:
        out, target = run_folder(folder, cell.run_id), data_folder(cell.run.data, folder)
        card: dict[str, str] = json.loads((out / "policy" / "policy.json").read_text())["card"]
        beside = cell.run.data.mixture
        for what, was, now in (
            (f"the backbone {cell.run.backbone!r}", card["backbone_hash"], backbones[cell.run.backbone]),
            (f"the demonstrations {target}", card["data_hash"], data.get((target, beside), card["data_hash"])),
        ):
            if was != now:
                raise UserError(
                    f"{out} was trained with other contents of {what} (hash {was[:10]}, now {now[:10]})",
                    "a study's runs from the same weights and demonstrations",
                    f"start over in a new folder: vlm4vla study run {folder / 'study.yaml'} --out {folder}-new",
                )


def _there(demonstrations: Path, mixture: tuple[SourceSpec, ...]) -> bool:
    """Whether all sources are still where they were in training."""
    beside = [path for each in mixture for path in (each.folder, each.conversations, each.images) if path]
    return all(Path(path).exists() for path in (demonstrations, *beside))


def audits(study: Study, folder: Path | None = None) -> dict[str, Audit]:
    """One of each cell, the training seed aside; ``folder`` holds the demonstrations where the spec names no size."""
    from vlm4vla.training.examine import examine

    made: dict[str, Audit] = {}
    for cell in study.cells():
        if cell.title not in made:
            made[cell.title] = examine(cell.run, picture_size(cell.run.data, folder))
    return made


def picture_size(data: DataSpec, folder: Path | None = None) -> int:
    """Pixels of the pictures that a policy trained on ``data`` is given."""
    if data.image_size is not None:
        return data.image_size
    from vlm4vla.data.lerobot import Dataset

    return Dataset.open(data_folder(data, folder or Path())).image_size


def _run_here(cells: list[Cell], folder: Path, runtime: Runtime, _: int) -> list[Failure]:
    """One cell after the other in this process, with the stages' own progress bars."""
    failures = []
    for number, cell in enumerate(cells, 1):
        _say(f"[{number}/{len(cells)}] {cell.run_id}")
        try:
            run_cell(cell, folder, runtime)
        except Exception as error:
            failures.append(_failed(cell, folder, _words(error)))
    return failures


def _run_apart(cells: list[Cell], folder: Path, runtime: Runtime, jobs: int) -> list[Failure]:
    """Each cell in a process of its own, ``jobs`` at a time, one progress line each."""
    quiet = runtime.model_copy(update={"progress": False})
    environment = {**os.environ, "OMP_NUM_THREADS": str(runtime.threads)}
    todo, running, failures = list(cells), dict[subprocess.Popen, _Line](), []
    free = list(range(jobs))
    store = Store(folder / RESULTS)
    try:
        while todo or running:
            while todo and free:
                cell = todo.pop(0)
                command = [sys.executable, "-m", "vlm4vla.studies.runner", str(folder), cell.run_id]
                with _log(folder, cell.run_id).open("a") as log:
                    process = subprocess.Popen(
                        [*command, quiet.model_dump_json(), str(os.getpid())],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                    )
                running[process] = _Line(cell, folder, free.pop(0), runtime.progress)
            time.sleep(POLL_S)
            for process, line in list(running.items()):
                code = process.poll()
                line.show(store)
                if code is None:
                    continue
                del running[process]
                line.bar.close()
                free.append(line.position)
                if code:
                    failures.append(_died(line.cell, folder, code))
                verdict = f"failed, see {_log(folder, line.cell.run_id)}" if code else "done"
                finished = len(cells) - len(todo) - len(running)
                _say(f"[{finished}/{len(cells)}] {line.cell.run_id} {verdict}")
    finally:
        for process, line in running.items():
            process.kill()  # every stage resumes
            process.wait()
            line.bar.close()
        store.close()
    return failures


class _Line:
    """A cell's progress: training steps, then episodes."""

    def __init__(self, cell: Cell, folder: Path, position: int, shown: bool):
        self.cell, self.position, self._folder = cell, position, folder
        self._wanted = list(cell.wanted())
        self._training, self._resumed = True, False
        steps = cell.run.training.steps
        self.bar = tqdm(total=steps, desc=cell.run_id, unit="step", position=position, leave=False, disable=not shown)

    def show(self, store: Store) -> None:
        if self.bar.disable:
            return
        out = run_folder(self._folder, self.cell.run_id)
        if self._training and (out / "policy").is_dir():
            self._training = self._resumed = False
            self.bar.unit, self.bar.initial = "episode", 0
            self.bar.reset(sum(episodes for *_, episodes in self._wanted))
        if self._training:
            self.bar.n = _trained_steps(out / "metrics.jsonl")
        else:
            self.bar.n = sum(store.finished(*wanted) for wanted in self._wanted)
        if not self._resumed:  # what earlier starts did is no part of the rate
            self.bar.initial, self._resumed = self.bar.n, True
        self.bar.refresh()


def _trained_steps(metrics: Path) -> int:
    """The step of the last row."""
    with contextlib.suppress(UserError):  # training itself says that the file is damaged
        if rows := read_metrics(metrics):
            return int(rows[-1]["step"])
    return 0


def _failed(cell: Cell, folder: Path, message: str) -> Failure:
    """Write the exception being handled into the cell's log and the store."""
    failure = Failure(cell.run_id, message, run_folder(folder, cell.run_id) / "log.txt")
    with contextlib.suppress(*UNWRITABLE), _log(folder, cell.run_id).open("a") as file:
        file.write(traceback.format_exc())
    with contextlib.suppress(*UNWRITABLE), Store(folder / RESULTS) as store:
        store.set_run(cell.run_id, status="failed", message=message[:MESSAGE_SIZE])
    return failure


def _died(cell: Cell, folder: Path, code: int) -> Failure:
    """A cell's process that ended badly: by an exception, which it stored, or by a signal, which it could not."""
    if code < 0:
        message = f"the process was ended by {signal.Signals(-code).name} (SIGKILL: is memory short?)"
    else:
        message = f"the process ended with status {code}"
    with contextlib.suppress(*UNWRITABLE), Store(folder / RESULTS) as store:
        row = store.runs()[cell.run_id]
        if code > 0 and row.status == "failed":
            message = row.message or message
        store.set_run(cell.run_id, status="failed", message=message)
    return Failure(cell.run_id, message, run_folder(folder, cell.run_id) / "log.txt")


def _words(error: Exception) -> str:
    """The error's message; its type where it says nothing, as ``MemoryError`` does."""
    return str(error).strip() or type(error).__name__


def _log(folder: Path, run_id: str) -> Path:
    path = run_folder(folder, run_id) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _write_study(study: Study, folder: Path) -> None:
    """Keep the study as it is run. A study may grow; another one needs another folder."""
    path = folder / "study.yaml"
    if path.exists() and (name := load_yaml(path).get("name")) != study.name:
        raise UserError(
            f"{folder}, which holds the study {name!r}", f"the folder of {study.name!r}, or a new one", "name another"
        )
    write_text(path, yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))


def main() -> None:
    """One cell of ``run``: ``python -m vlm4vla.studies.runner FOLDER RUN_ID RUNTIME PARENT``."""
    folder, run_id, runtime, parent = sys.argv[1:]
    exit_with_parent(int(parent))
    cells = {cell.run_id: cell for cell in load(Path(folder) / "study.yaml").cells()}
    run_cell(cells[run_id], Path(folder), Runtime.model_validate_json(runtime))


if __name__ == "__main__":
    main()
