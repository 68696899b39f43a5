"""``train --tracker``: what each one is told, what it leaves where, and what is said when it cannot be."""

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import pytest
from accelerate.utils import LoggerType
from click.testing import CliRunner
from safetensors.torch import save_file

from test_imitation import demonstrations, spec  # noqa: F401 (a fixture)
from vlm4vla.cli import cli
from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics
from vlm4vla.spec import Runtime
from vlm4vla.training import loop
from vlm4vla.training.imitation import train

STAND_IN = """
told = []
class Run:
    def log(self, values, step):
        told.append((step, values))
    def finish(self):
        told.append("finished")
class config:
    def update(values, allow_val_change):
        told.append(values)
def init(**options):
    if options["project"] != "vlm4vla":
        raise ValueError(options)
    told.append(options)
    return Run()
"""


@pytest.fixture
def run(spec, tmp_path, monkeypatch):  # noqa: F811
    """Trains two steps with a tracker; the folder."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    demos, out = demonstrations(tmp_path / "demos"), tmp_path / "mine"

    def run(tracker):
        train(spec, demos, out, Runtime(device="cpu", progress=False, trackers=(tracker,)))
        return out

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """A package ``wandb`` that remembers what it is told."""
    package: Any = ModuleType("wandb")
    exec(STAND_IN, vars(package))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    return package


def test_a_tracker_is_told_what_the_file_of_metrics_has(run, stand_in):
    out = run("wandb")
    options, config, *rows, finished = stand_in.told
    identity = json.loads((out / "finished.json").read_text())["identity"]
    assert options == {"project": "vlm4vla", "name": f"mine-{identity}", "group": identity, "dir": str(out)}
    assert (config["identity"], config["steps"]) == (identity, 2)
    assert [{"step": step, **values} for step, values in rows] == read_metrics(out / "metrics.jsonl")
    assert finished == "finished"


def test_a_training_that_is_refused_leaves_no_run_with_a_tracker(run, stand_in, tmp_path):
    (tmp_path / "mine").mkdir()
    save_file({}, tmp_path / "mine" / "checkpoint.safetensors", {"step": "1", "identity": "another"})
    with pytest.raises(UserError, match="belongs to the run another"):
        run("wandb")
    assert not stand_in.told


def test_a_tracker_that_does_not_start_is_told(run, stand_in, monkeypatch):
    def init(**_):
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(stand_in, "init", init)
    with pytest.raises(UserError, match=r"does not start \(RuntimeError: No API key(.|\n)*WANDB_MODE=offline"):
        run("wandb")


def test_a_tracker_that_is_not_installed_is_named_with_its_package(run, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UserError, match="pip install trackio"):
        run("trackio")


def test_an_unknown_tracker_is_told_with_those_there_are():
    done = CliRunner().invoke(cli, ["train", "--out", "x", "--tracker", "comet"])
    assert done.exit_code == 2
    assert "'tensorboard', 'wandb', 'trackio', 'mlflow'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_the_real_package_takes_what_it_is_told(run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name, reason=f"pip install {name}")
    before = set(tmp_path.iterdir())
    last = read_metrics(run(name) / "metrics.jsonl")[-1]
    left = {path.name for path in set(tmp_path.iterdir()) - before} - {"mine"}
    if name == "mlflow":
        mlflow = importlib.import_module("mlflow")
        (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        assert found.data.metrics == {key: pytest.approx(value) for key, value in last.items() if key != "step"}
        assert "mine.db" in left
    elif name == "trackio":
        assert (tmp_path / "trackio" / "vlm4vla.db").is_file()
    else:
        assert not left, "all of it lies beside the policy"
        assert list(
            (tmp_path / "mine").glob(
                {"wandb": "wandb/offline-run-*/*.wandb", "tensorboard": "vlm4vla/**/events*"}[name]
            )
        )
