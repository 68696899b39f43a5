"""Policies travel over the hub's own protocol to a stand-in and back; pickles do not."""

import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from fake_hub import FakeHub
from vlm4vla.cli import cli
from vlm4vla.policy import Policy
from vlm4vla.types import Observation

PUSH_AND_LOAD = """
import sys
from vlm4vla.cli import main
sys.argv = ["vlm4vla", "policy", "push", sys.argv[1], "hub:somebody/policy"]
main()
"""
LOAD = """
import sys
import numpy as np
from vlm4vla.policy import Policy
from vlm4vla.types import Observation
look = Observation({"main": np.full((96, 96, 3), 100, np.uint8)}, "place it on cat")
np.save(sys.argv[1], Policy.load("hub:somebody/policy").predict([look])[0].actions)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The address is read when huggingface_hub is imported: other processes use it."""
    hub = FakeHub()
    for name, value in {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    return hub


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ, capture_output=True, text=True, timeout=120
    )


def test_a_policy_goes_to_the_hub_and_comes_back(hub, policy_folder, tmp_path):
    done = python(PUSH_AND_LOAD, policy_folder)
    assert done.returncode == 0, done.stderr
    assert "eval hub:somebody/policy --protocol" in done.stderr
    files = hub.repositories["somebody/policy"]
    assert files["action.safetensors"] == (policy_folder / "action.safetensors").read_bytes()
    files["vlm/pytorch_model.bin"] = b"a pickle that somebody put there"

    done = python(LOAD, tmp_path / "chunk.npy")
    assert done.returncode == 0, done.stderr
    look = Observation({"main": np.full((96, 96, 3), 100, np.uint8)}, "place it on cat")
    assert np.array_equal(np.load(tmp_path / "chunk.npy"), Policy.load(policy_folder).predict([look])[0].actions)
    assert not any(path.endswith(".bin") for path in hub.asked)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_repository_that_is_not_there_is_named(hub, tmp_path):
    done = python(
        "from vlm4vla.hub import fetch\nfrom vlm4vla.errors import UserError\n"
        "try: fetch('hub:nobody/nothing')\nexcept UserError as error: print(error)"
    )
    assert "hub:nobody/nothing" in done.stdout, done.stderr
    assert "hf auth whoami" in done.stdout


def test_merge_refuses_a_folder_that_is_there(policy_folder):
    done = CliRunner().invoke(cli, ["policy", "merge", str(policy_folder), "--out", str(policy_folder)])
    assert "which is there already" in str(done.exception)
