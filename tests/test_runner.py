"""The study runner: every stage once, whatever is killed, and one bad cell harms no other."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import fake_sim
import fake_stages
from vlm4vla.errors import UserError
from vlm4vla.sims import protocols
from vlm4vla.spec import Runtime
from vlm4vla.studies import runner
from vlm4vla.studies.matrix import Study, curve_id, plan
from vlm4vla.studies.runner import run, run_folder
from vlm4vla.studies.store import Store

QUIET = Runtime(progress=False, workers=1)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch, tmp_path):
    """The stand-ins, here and in every process started from here."""
    fake_stages.install(
        lambda name, module: monkeypatch.setitem(sys.modules, name, module),
        lambda module, name, value: monkeypatch.setattr(module, name, value, raising=False),
    )
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import fake_stages\nfake_stages.install()\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parent}", prepend=os.pathsep)
    assert protocols.protocol is fake_stages.protocol
    monkeypatch.setattr(runner, "POLL_S", 0.05)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def study(name="small", episodes=4, curve_episodes=0, overrides=(), **matrix):
    return Study.model_validate(
        {
            "name": name,
            "base": {"training.steps": 20, "data.protocol": "fake/line/v1"},
            "matrix": {"treatment": ["full", "scratch"], **matrix},
            "overrides": overrides,
            "evaluate": {"protocols": ["fake/a/v1"], "episodes": episodes, "curve_episodes": curve_episodes},
        }
    )


def calls(folder):
    return Counter((folder / "calls.txt").read_text().split("\n")[:-1])


def rows(folder):
    """Everything but times."""
    with Store(folder / "results.sqlite") as store:
        return [
            (run_id, [(r.episode, r.seed, r.success, r.steps, r.credits) for r in store.results(run_id, protocol)])
            for run_id, protocol, *_ in store.evaluated()
        ]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_runs_once(folder, jobs):
    small = study()
    run(small, folder, QUIET, jobs)
    ids = [cell.run_id for cell in small.cells()]
    assert calls(folder) == {"record": 1, **{f"train {i}": 1 for i in ids}, "load policy": 2}
    assert [run_id for run_id, _ in rows(folder)] == sorted(ids)
    assert all(len(episodes) == 4 for _, episodes in rows(folder))
    assert all(row.status == "done" for row in plan(small, folder).rows)
    with Store(folder / "results.sqlite") as store:
        for run_id in ids:
            row = store.runs()[run_id]
            assert (row.status, row.data_hash, row.versions) == ("done", "d" * 10, {"torch": "none"})
            assert row.spec["treatment"] in run_id
            assert row.seconds > 0
    assert len(list((run_folder(folder, ids[0]) / "strips").glob("*.png"))) == 4

    before, did = rows(folder), calls(folder)
    run(small, folder, QUIET, jobs)
    assert (rows(folder), calls(folder)) == (before, did), "finished cells are not touched"


def test_a_study_grows(folder):
    run(study(), folder, QUIET)
    grown = study(episodes=6, seed=[0, 1])
    assert [row.status for row in plan(grown, folder).rows] == ["partial", "todo", "partial", "todo"]
    run(grown, folder, QUIET)
    assert calls(folder)["record"] == 1
    assert sum(number for call, number in calls(folder).items() if call.startswith("train")) == 4
    assert all(len(episodes) == 6 for _, episodes in rows(folder))
    with pytest.raises(UserError, match="holds the study 'small'"):
        run(study(name="other"), folder, QUIET)


def test_policies_of_other_weights_or_demonstrations_are_not_mixed(folder, monkeypatch):
    """A run id holds the names of backbone and data, so only the hashes tell that their contents changed."""
    run(study(), folder, QUIET)
    before = calls(folder)
    grown = study(seed=[0, 1])
    for owner, name, value, said in (
        (
            sys.modules["vlm4vla.backbones.load"],
            "load_vlm",
            lambda name: ("new weights", None),
            "the backbone.*now new",
        ),
        (fake_stages.Sources, "content_hash", "e" * 10, "the demonstrations.*now eeee"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(UserError, match=rf"{folder}/runs/.*{said}(?s:.*)--out {folder}-new"):
                run(grown, folder, QUIET)
    assert calls(folder) == before, "nothing is trained beside them"
    run(grown, folder, QUIET)


def test_a_trained_study_outlives_what_its_mixtures_were_drawn_from(folder, tmp_path, monkeypatch):
    path = tmp_path / "talks.jsonl"
    path.touch()
    mixed = study(**{"data.mixture": [[], [{"conversations": str(path)}]]})
    run(mixed, folder, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(fake_stages.Sources, "content_hash", "e" * 10)
        with pytest.raises(UserError, match="other contents of the demonstrations"):
            run(mixed, folder, QUIET)
    before = calls(folder)
    path.unlink()
    run(mixed, folder, QUIET)
    assert calls(folder) == before


def test_intermediate_policies_give_a_curve(folder):
    small = study(curve_episodes=2, **{"training.checkpoints": [4]})
    run(small, folder, QUIET)
    ids = [cell.run_id for cell in small.cells()]
    numbers = {run_id: len(episodes) for run_id, episodes in rows(folder)}
    assert numbers == {i: 4 for i in ids} | {curve_id(i, step): 2 for i in ids for step in (5, 10, 15)}
    assert calls(folder)["load step-000010"] == 2
    assert not list(run_folder(folder, ids[0]).glob("strips/*step*"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_cell_stops_no_other(folder, jobs):
    small = study(overrides=[{"when": {"treatment": "full"}, "set": {"training.learning_rate": 2.0}}])
    bad, good = [cell.run_id for cell in small.cells()]
    with pytest.raises(UserError, match=rf"1 of 2 cells(?s:.*){bad}: the loss is not finite \(log: (.*)\)") as caught:
        run(small, folder, QUIET, jobs)
    assert good not in str(caught.value)
    log = run_folder(folder, bad) / "log.txt"
    assert str(log) in str(caught.value)
    assert "Traceback" in log.read_text()
    with Store(folder / "results.sqlite") as store:
        status = {run_id: (row.status, row.message) for run_id, row in store.runs().items()}
    assert status == {bad: ("failed", "the loss is not finite"), good: ("done", "")}


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_without_words_is_told_by_its_type(folder, jobs):
    small = study(overrides=[{"when": {"treatment": "full"}, "set": {"training.learning_rate": 0.25}}])
    with pytest.raises(UserError, match=r"1 of 2 cells(?s:.*): MemoryError \(log"):
        run(small, folder, QUIET, jobs)


def test_a_failure_that_cannot_be_written_down_harms_no_other_cell(folder, monkeypatch):
    small = study(overrides=[{"when": {"treatment": "full"}, "set": {"training.learning_rate": 2.0}}])
    bad, good = [cell.run_id for cell in small.cells()]
    (run_folder(folder, bad) / "log.txt").mkdir(parents=True)  # IsADirectoryError, as ENOSPC is an OSError
    set_run = Store.set_run

    def full(store, run_id, **changes):
        if changes.get("status") == "failed":
            raise sqlite3.OperationalError("database or disk is full")
        set_run(store, run_id, **changes)

    monkeypatch.setattr(Store, "set_run", full)
    with pytest.raises(UserError, match=rf"1 of 2 cells(?s:.*){bad}: the loss is not finite"):
        run(small, folder, QUIET)
    assert {row.cell.run_id: row.status for row in plan(small, folder).rows}[good] == "done"


def test_a_cell_killed_by_a_signal_is_told_and_mended_by_rerunning(folder):
    small = study(overrides=[{"when": {"treatment": "full"}, "set": {"training.learning_rate": 0.5}}])
    with pytest.raises(UserError, match="ended by SIGKILL"):
        run(small, folder, QUIET, jobs=2)
    run(small, folder, QUIET, jobs=2)
    assert {row.status for row in plan(small, folder).rows} == {"done"}


def test_episodes_that_the_infrastructure_failed_are_told_with_the_reason(folder, monkeypatch):
    troubled = fake_sim.protocol("fake/a/v1", trouble={str(fake_sim.FIRST_SEED + 1): "raise"})
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "protocol", lambda name: troubled)
        with pytest.raises(UserError) as failed:
            run(study(), folder, QUIET)
    assert str(failed.value).count("1 of 4 episodes that the infrastructure failed") == 2
    assert "RuntimeError: the physics exploded" in str(failed.value)
    run(study(), folder, QUIET)
    assert {row.status for row in plan(study(), folder).rows} == {"done"}


def test_a_failing_recording_fails_its_cells_only(folder, monkeypatch):
    def record(data, target, workers, progress):
        if data.seed == 1:
            raise UserError("an expert that fails", "one that succeeds", "mend it")
        fake_stages.record(data, target, workers, progress)

    monkeypatch.setattr(sys.modules["vlm4vla.data.record"], "record", record)
    small = study(**{"data.seed": [0, 1]})
    with pytest.raises(UserError, match=r"2 of 4 cells(?s:.*)recording failed: found: an expert that fails"):
        run(small, folder, QUIET)
    assert sorted(row.status for row in plan(small, folder).rows) == ["done", "done", "todo", "todo"]


SCRIPT = """
import sys
from pathlib import Path
from vlm4vla.spec import Runtime
from vlm4vla.studies.matrix import load
from vlm4vla.studies.runner import run
run(load(sys.argv[1]), Path(sys.argv[2]), Runtime(progress=False, workers=1), jobs=int(sys.argv[3]))
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_anywhere_it_goes_on(folder, tmp_path, monkeypatch, jobs):
    small = study(episodes=6)
    reference = tmp_path / "reference"
    run(small, reference, QUIET)
    monkeypatch.setenv("FAKE_LATENCY", "0.05")
    command = [sys.executable, "-c", SCRIPT, str(reference / "study.yaml"), str(folder), str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not ((folder / "results.sqlite").exists() and any(len(e) >= 2 for _, e in rows(folder))):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(row.status == "partial" for row in plan(small, folder).rows)

    monkeypatch.setenv("FAKE_LATENCY", "0")
    run(small, folder, QUIET, jobs)
    assert rows(folder) == rows(reference)
    did = calls(folder)
    del did["load policy"]
    assert set(did.values()) == {1}, "what had finished is not repeated"


def test_one_runner_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(runner, "ORPHAN_S", 0.2)
    folder.mkdir()
    code = "import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\nprint(1)\ninput()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="another process at work on this study"):
        run(study(), folder, QUIET)
    holder.kill()
    holder.communicate()
    run(study(), folder, QUIET)


def test_runner_imports_no_torch():
    code = "import vlm4vla.studies.runner, sys; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})
