"""Policy folders: what is judged is what is named, and a damaged one says so."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fake_sim import CONVENTION
from vlm4vla.backbones import tiny
from vlm4vla.cli import cli
from vlm4vla.data.normalize import Normalizer
from vlm4vla.policy import VLA, Policy
from vlm4vla.sims import protocols
from vlm4vla.skills.questions import words
from vlm4vla.spec import RunSpec


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A whole policy folder with random weights."""
    spec = RunSpec()
    torch.manual_seed(0)
    actions = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    actions[:, -1] = actions[:, -1] > 0
    vla = VLA(*tiny.build(["cat"], words(), 0), spec, 0)
    folder = tmp_path_factory.mktemp("original") / "policy"
    folder.mkdir()
    Policy(vla, spec, CONVENTION, Normalizer.fit(actions), None, 96, {}).save(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "policy")


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
