"""The training loop on a tiny regression: resume, kill, average, export, non-finite loss, foreign checkpoints."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vlm4vla.data.mixture import shuffled
from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics
from vlm4vla.policy import torch_device
from vlm4vla.spec import Runtime, TrainSpec
from vlm4vla.training import checkpoint
from vlm4vla.training.loop import fit, learning_rate, make_batch

QUIET = Runtime(device="cpu", progress=False, checkpoint_s=0)


class Regression:
    def __init__(self, bad_step: int | None = None, pause: float = 0.0):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.data = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        self.bad_step, self.pause, self.step = bad_step, pause, 0

    def parameter_groups(self):
        return [{"params": list(self.module.parameters()), "lr_scale": 1.0}]

    def draw(self, positions, seed):
        return shuffled(50, positions, seed)

    def batch(self, indices, rng):
        x = self.data[indices] + rng.normal(scale=0.1, size=(len(indices), 4)).astype(np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(x.sum(1, keepdims=True))}

    def loss(self, batch, whole):
        time.sleep(self.pause)
        loss = (self.module(batch["x"]) - batch["y"]).square().sum() / whole["rows"]
        self.step += 1
        return loss * (float("nan") if self.step - 1 == self.bad_step else 1.0), {"half": loss.detach() / 2}

    def amounts(self, batch):
        return {"rows": torch.tensor(len(batch["x"]))}

    def export(self, folder, state):
        save_file(state, folder / "weights.safetensors")


SPEC = TrainSpec(steps=40, batch_size=8, learning_rate=1e-2, warmup_steps=5, ema=0.9, checkpoints=2, schedule="cosine")


def weights(folder):
    return load_file(folder / "policy" / "weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_logs_and_exports(tmp_path):
    fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "policies" / "step-000020").is_dir()
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "checkpoint.safetensors").exists(), "three times the weights"


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    fit(Regression(), SPEC, 0, tmp_path / "whole", QUIET, "x")

    class StopError(Exception):
        pass

    class Interrupted(Regression):
        def loss(self, batch, whole):
            if self.step == 27:
                raise StopError
            return super().loss(batch, whole)

    with pytest.raises(StopError):
        fit(Interrupted(), SPEC, 0, tmp_path / "parts", QUIET, "x")
    fit(Regression(), SPEC, 0, tmp_path / "parts", QUIET, "x")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    steps = [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == [10, 20, 30, 40]


def test_kill_9_and_rerun_gives_the_same_weights(tmp_path):
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from pathlib import Path
        from test_loop import *
        torch.set_num_threads(1)
        fit(Regression(pause=0.02), SPEC, 0, Path(sys.argv[1]), QUIET, "x")
    """)
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(killed)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (killed / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "policy").exists()
    fit(Regression(), SPEC, 0, killed, QUIET, "x")
    fit(Regression(), SPEC, 0, tmp_path / "whole", QUIET, "x")
    assert same(weights(killed), weights(tmp_path / "whole"))


def test_killed_right_after_a_checkpoint_no_policy_on_the_way_is_lost(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def save_and_die(out, step, *rest):
        checkpoint.save(out, step, *rest)
        if step == 20:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("vlm4vla.training.loop.checkpoint", SimpleNamespace(**{**vars(checkpoint), "save": save_and_die}))
        with pytest.raises(KilledError):
            fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")
    fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")
    assert (tmp_path / "policies" / "step-000020" / "weights.safetensors").is_file()


def test_one_training_into_a_folder_at_a_time(tmp_path):
    """The second would remove what the first is writing."""

    class Meanwhile(Regression):
        def export(self, folder, state):
            with pytest.raises(UserError, match=f"another process at work on this training .process {os.getpid()}"):
                fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")
            super().export(folder, state)

    fit(Meanwhile(), SPEC, 0, tmp_path, QUIET, "x")
    assert (tmp_path / "policy").is_dir()


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "gpu"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(UserError, match=f"no device '{device}'"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET.model_copy(update={"device": device}), "x")
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_the_device_is_the_one_asked_for(tmp_path, monkeypatch, capsys):
    """On the meta device, which stands in for a second GPU."""
    monkeypatch.setattr("vlm4vla.training.loop.torch_device", lambda name: torch.device("meta"))
    seen = set()

    class Spy(Regression):
        def loss(self, batch, whole):
            seen.update(value.device.type for value in (*batch.values(), *self.module.parameters()))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(Spy(), SPEC, 0, tmp_path, QUIET, "x")
    assert seen == {"meta"}


def test_a_tracker_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tracker nobody"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET.model_copy(update={"trackers": ("nobody",)}), "x")


def test_a_checkpoint_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / checkpoint.NAME).mkdir()
    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save_tensors(tmp_path / checkpoint.NAME, {"a": torch.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_auto_says_which_device_it_takes(monkeypatch, capsys):
    assert str(torch_device("auto")) in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(torch_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]


def test_trainings_of_either_precision_in_one_process(tmp_path):
    for number, precision in enumerate(("fp32", "bf16", "fp32")):
        spec = SPEC.model_copy(update={"precision": precision})
        fit(Regression(), spec, 0, tmp_path / str(number), QUIET, "x")
    first, half, again = (weights(tmp_path / str(number)) for number in range(3))
    assert same(first, again)
    assert not same(first, half)


def test_another_seed_gives_other_weights(tmp_path):
    fit(Regression(), SPEC, 0, tmp_path / "a", QUIET, "x")
    fit(Regression(), SPEC, 1, tmp_path / "b", QUIET, "x")
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_each_epoch_sees_every_sample_once():
    seen = []

    class Spy(Regression):
        def batch(self, indices, rng):
            seen.extend(indices)
            return super().batch(indices, rng)

    spec = TrainSpec(steps=25, batch_size=8)
    for step in range(25):
        make_batch(Spy(), spec, 0, step)
    epochs = np.array(seen).reshape(4, 50)
    assert (np.sort(epochs) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path):
    with pytest.raises(UserError, match="loss not finite at step 13"):
        fit(Regression(bad_step=13), SPEC, 0, tmp_path, QUIET, "x")
    saved = load_file(tmp_path / "bad-batch-000013.safetensors")
    assert torch.equal(saved["x"], make_batch(Regression(), SPEC, 0, 13)["x"])
    assert not (tmp_path / "policy").exists()


def test_a_gradient_that_is_not_finite_stops_there(tmp_path):
    class Root(Regression):
        """sqrt has no slope at 0, where its value is finite."""

        def loss(self, batch, whole):
            loss, parts = super().loss(batch, whole)
            return loss + (loss * (self.step != 14)).sqrt() * 0.01, parts

    with pytest.raises(UserError, match="gradient not finite at step 13"):
        fit(Root(), SPEC, 0, tmp_path, QUIET, "x")
    assert not list(tmp_path.rglob("weights.safetensors"))


def test_weights_that_are_not_finite_are_neither_kept_nor_exported(tmp_path):
    class Overflow(Regression):
        """Spoils a weight that the loss of the last step does not look at."""

        def loss(self, batch, whole):
            if self.step < 39:
                return super().loss(batch, whole)
            self.module[0].weight.data.fill_(float("inf"))
            return self.module[2].bias.square().sum(), {"half": torch.zeros(())}

    with pytest.raises(UserError, match="weights not finite at step 39"):
        fit(Overflow(), SPEC, 0, tmp_path, QUIET, "x")
    assert not (tmp_path / "policy").exists()
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "30"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        fit(Regression(bad_step=25), SPEC, 0, tmp_path, QUIET, "x")
    with pytest.raises(UserError, match="belongs to the run x"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET, "y")


def test_a_finished_policy_is_kept_for_its_own_run_only(tmp_path):
    fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")
    before = (tmp_path / "policy").stat().st_ino
    fit(Regression(bad_step=0), SPEC, 0, tmp_path, QUIET, "x")
    assert (tmp_path / "policy").stat().st_ino == before
    with pytest.raises(UserError, match="belongs to the run x"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET, "y")
    (tmp_path / "finished.json").unlink()
    with pytest.raises(UserError, match="belongs to the run unknown"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")


def test_a_checkpoint_that_lacks_what_is_trained_is_told(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        fit(Regression(bad_step=25), SPEC, 0, tmp_path, QUIET, "x")
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    lacking = sorted(name for name in tensors if name.startswith("model."))[0]
    save_file({name: value for name, value in tensors.items() if name != lacking}, path, metadata)
    with pytest.raises(UserError, match=f"without 1 of the parameters .*{lacking.removeprefix('model.')}"):
        fit(Regression(), SPEC, 0, tmp_path, QUIET, "x")


def test_learning_rate_warms_up_then_follows_the_schedule():
    constant = TrainSpec(steps=100, learning_rate=1.0, warmup_steps=10)
    assert learning_rate(constant, 4) == pytest.approx(0.5)
    assert learning_rate(constant, 99) == 1.0
    cosine = TrainSpec(steps=100, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(cosine, 50) == pytest.approx(0.5)
    assert learning_rate(cosine, 99) < 0.001
