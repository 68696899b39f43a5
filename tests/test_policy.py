"""Policy folders: what is judged is what is named, and a damaged one says so."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fake_sim import CONVENTION
from vlm4vla.cli import cli
from vlm4vla.errors import UserError
from vlm4vla.policy import Policy
from vlm4vla.sims import protocols
from vlm4vla.spec import RunSpec, TrainSpec
from vlm4vla.types import Observation


@pytest.fixture
def folder(policy_folder, tmp_path):
    return shutil.copytree(policy_folder, tmp_path / "policy")


def test_two_policies_of_a_run_are_judged_apart(folder, tmp_path, monkeypatch):
    """The intermediate and the last policy, and one trained again, share a run id and a store."""
    judged = []

    def evaluate(policy, protocol, episodes, store, run_id, **_):
        judged.append(run_id)
        return []

    monkeypatch.setattr("vlm4vla.evaluation.rollout.evaluate", evaluate)
    monkeypatch.setattr("vlm4vla.studies.stats.summarise", lambda results: type("Rate", (), {"faults": 0})())
    step = shutil.copytree(folder, tmp_path / "policies" / "step-000500")
    again = shutil.copytree(folder, tmp_path / "again" / "policy")
    weights = Policy.load(again)
    with torch.no_grad():
        weights.vla.backbone.query += 1
    weights.save(again)
    for each in (folder, folder, step, again):
        done = CliRunner().invoke(cli, ["eval", str(each), "--protocol", protocols.protocol_names()[0]])
        assert done.exit_code == 0, done.exception
    first, same, early, other = judged
    assert first == same
    assert len({first, early, other}) == 3
    assert all(run_id.startswith(RunSpec().run_id) for run_id in judged)
    assert "step-000500" in early


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "other":
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "convention": {"names": []}}))
    elif how == "less":
        path.write_text(json.dumps({"format": 1}))
    elif how == "a list":
        path.write_text("[]")
    else:
        save_file({name: value[:1].clone() for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("policy.json", how) for how in ("cut short", "other", "less", "a list")],
        *[("action.safetensors", how) for how in ("gone", "cut short", "other shapes")],
        *[("vlm/model.safetensors", how) for how in ("gone", "cut short")],
    ],
)
def test_a_damaged_folder_says_so_and_what_to_do(folder, name, how):
    damage(folder / name, how)
    with pytest.raises(UserError, match="damaged") as caught:
        Policy.load(folder)
    assert str(folder / name.split("/")[0]) in caught.value.found
    assert "train it again" in caught.value.next_step
    assert "hf download" not in str(caught.value)


def test_a_whole_folder_acts_as_what_was_saved(policy_folder):
    a, b = Policy.load(policy_folder), Policy.load(policy_folder)
    look = Observation({"main": np.full((96, 96, 3), 100, np.uint8)}, "place it on cat")
    assert np.array_equal(a.predict([look])[0].actions, b.predict([look])[0].actions)
    assert (a.spec, a.convention, a.image_size) == (RunSpec(), CONVENTION, 96)


def test_the_vlm_acts_in_the_precision_that_it_was_trained_in_and_the_head_in_fp32(policy_folder):
    policy = Policy.load(policy_folder)
    look = Observation({"main": np.full((96, 96, 3), 100, np.uint8)}, "place it on cat")
    kinds = []
    for module in (policy.vla.backbone.vlm.get_decoder().layers[0].mlp, policy.vla.head.trunk):
        module.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    full = policy.predict([look])[0].actions
    policy.spec = policy.spec.model_copy(update={"training": TrainSpec(precision="bf16")})
    half = policy.predict([look])[0].actions
    assert kinds == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    np.testing.assert_allclose(half, full, atol=0.05)


def test_answering_is_timed_as_it_is_called(monkeypatch, capsys):
    """An autocast around the benchmark's calls would spare ``predict`` a casting of weights that it does itself."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    arguments = ["--precision", "bf16", "--repeats", "1", "--batches", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predict_latency.py", *arguments])
    predict, around = Policy.predict, []

    def watched(policy, observations):
        around.append(torch.is_autocast_enabled("cpu"))
        return predict(policy, observations)

    monkeypatch.setattr(Policy, "predict", watched)
    importlib.import_module("predict_latency").main()
    assert "x the floor" in capsys.readouterr().out
    assert around
    assert not any(around)
