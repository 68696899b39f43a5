"""Recording an expert: parallel, resumable, the same to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fake_sim import CONVENTION
from vlm4vla.data import record as recording
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.record import record, record_episode
from vlm4vla.errors import UserError
from vlm4vla.sims import protocols
from vlm4vla.sims.base import StepOutcome
from vlm4vla.sims.protocols import Protocol
from vlm4vla.spec import DataSpec
from vlm4vla.types import Observation

LIMIT = 0.05


class ExpertSim:
    """A point goes to 0 in steps of at most ``LIMIT`` and lets go there. Seeds divisible by ``fail`` have a weak motor
    and run out of time. Each reset is a line in the file that EXPERT_LOG names."""

    convention = CONVENTION
    versions = {"OpenGL": "a pencil"}  # noqa: RUF012

    def __init__(self, image_size, max_steps=40, fail=5, step_s=0.0, crash=None, expert=True):
        self.image_size, self.max_steps, self.fail = image_size, max_steps, fail
        self.step_s, self.crash, self.has_expert = step_s, crash, expert

    def reset(self, seed):
        if log := os.environ.get("EXPERT_LOG"):
            with open(log, "a") as file:
                file.write(f"{seed}\n")
        if seed == self.crash:
            os.kill(os.getpid(), signal.SIGKILL)
        self.at = np.random.default_rng(seed).uniform(-0.3, 0.3, 3)
        self.seed, self.steps, self.executed = seed, 0, []

    def execute(self, actions):
        (action,) = actions
        time.sleep(self.step_s)
        self.executed.append(action)
        self.at = self.at + action[:3] * (0.01 if self.seed % self.fail == 0 else 1)
        self.steps += 1
        released = action[6] == 1
        return StepOutcome(1, bool(released or self.steps == self.max_steps), bool(released))

    def observe(self):
        image = np.full((self.image_size, self.image_size, 3), self.steps, np.uint8)
        image[0] = np.clip(self.at * 200 + 100, 0, 255)
        return Observation({"main": image}, f"go to {self.seed % 3}", self.at.astype(np.float32))

    def expert(self):
        if not self.has_expert:
            raise NotImplementedError
        action = np.zeros(7, np.float32)
        action[:3] = np.clip(-self.at, -LIMIT, LIMIT)
        action[6] = np.abs(self.at).max() < 0.02
        return action

    def close(self):
        pass


def fake(**sim_args):
    """``protocols.protocol`` for the simulator above."""
    return lambda name: Protocol(name, "test_record:ExpertSim", sim_args, max_steps=60)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(protocols, "protocol", fake(), raising=False)
    return DataSpec(protocol="fake/line/v1", episodes=6, seed=2, image_size=16, noise=0.01)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


def test_the_label_is_the_expert_at_the_visited_state_and_the_last_frame_releases():
    sim = ExpertSim(16)
    episode = record_episode(sim, 7, 0.01, 60)
    assert episode is not None
    assert episode.states is not None
    clean = np.clip(-episode.states, -LIMIT, LIMIT)
    assert episode.actions[:, :3] == pytest.approx(clean, abs=1e-7)
    assert episode.actions[:, 6].tolist() == [0] * (len(episode.actions) - 1) + [1]
    assert len(episode.images["main"]) == len(sim.executed)


def test_some_executed_actions_are_disturbed_as_documented():
    sim, offsets = ExpertSim(16, fail=10**9, max_steps=500), []
    for seed in range(1, 40):
        episode = record_episode(sim, seed, 0.01, 500)
        assert episode is not None
        offsets.append(np.stack(sim.executed) - episode.actions)
    offsets = np.concatenate(offsets)
    disturbed = np.abs(offsets[:, :3]).max(1) > 0
    # 3.5 standard errors of a share and of a standard deviation.
    assert disturbed.mean() == pytest.approx(0.4, abs=3.5 * np.sqrt(0.24 / len(offsets)))
    assert (offsets[:, 3:] == 0).all()
    count = disturbed.sum()
    assert offsets[disturbed, :3].std(0) == pytest.approx([0.01, 0.01, 0.006], rel=3.5 / np.sqrt(2 * count))


def test_an_episode_depends_on_its_seed_alone():
    sim = ExpertSim(16)
    first = record_episode(sim, 7, 0.01, 60)
    record_episode(sim, 8, 0.01, 60)
    again = record_episode(sim, 7, 0.01, 60)
    assert first is not None
    assert again is not None
    assert first.images == again.images
    assert (first.actions == again.actions).all()


def test_failures_and_timeouts_are_no_demonstrations():
    assert record_episode(ExpertSim(16), 10, 0.01, 60) is None
    assert record_episode(ExpertSim(16), 7, 0.01, 3) is None


def test_the_provenance_names_what_drew_the_pictures(tmp_path, data):
    record(data, tmp_path / "out", 1, progress=False)
    provenance = Dataset.open(tmp_path / "out").info["vlm4vla"]["provenance"]
    assert provenance["versions"] == {"OpenGL": ["a pencil"], "numpy": [np.__version__]}


def test_two_processes_record_what_one_does(tmp_path, data, monkeypatch):
    alone = record(data, tmp_path / "one", 1, progress=False)
    monkeypatch.setenv("EXPERT_LOG", str(tmp_path / "log"))
    together = record(data, tmp_path / "two", 2, progress=False)
    assert alone.failed_seeds == together.failed_seeds == (2_000_000, 2_000_005)
    assert (alone.episodes, alone.frames) == (6, Dataset.open(tmp_path / "two").num_frames)
    assert "failed 2 of 8 attempts" in str(alone)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    attempts = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sorted(attempts) == list(range(2_000_000, 2_000_008))
    # Complete: nothing is recorded again.
    assert record(data, tmp_path / "two", 2, progress=False) == together
    assert len((tmp_path / "log").read_text().split()) == 8
    assert not (tmp_path / "two.partial").exists()
    dataset = Dataset.open(tmp_path / "two")
    assert dataset.convention == CONVENTION
    assert dataset.image_size == 16
    assert len(dataset.tasks) == 3


def test_another_recording_is_not_overwritten(tmp_path, data):
    record(data, tmp_path / "demos", 1, progress=False)
    other = data.model_copy(update={"noise": 0.02})
    with pytest.raises(UserError, match="another data set"):
        record(other, tmp_path / "demos", 1, progress=False)


SLOW = """
import sys
from pathlib import Path
from test_record import fake
from vlm4vla.data.record import record
from vlm4vla.sims import protocols
from vlm4vla.spec import DataSpec
if __name__ == "__main__":
    protocols.protocol = fake(step_s=0.01)
    data = DataSpec(protocol="fake/line/v1", episodes=6, seed=2, image_size=16, noise=0.01)
    record(data, Path(sys.argv[1]), 2, progress=False)
"""


def start_slow(tmp_path, log):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "EXPERT_LOG": str(log), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, str(script), str(tmp_path / "demos")], env=env)


def wait_for(condition, what, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kill_9_costs_only_the_episodes_in_progress(tmp_path, data, monkeypatch):
    monkeypatch.setattr(protocols, "protocol", fake(step_s=0.01))
    log, shards = tmp_path / "log", tmp_path / "demos.partial" / "episodes"
    process = start_slow(tmp_path, log)
    wait_for(lambda: len(list(shards.glob("[0-9]*"))) >= 3, "three attempts")

    # Meanwhile the folder is taken ...
    with pytest.raises(UserError, match=rf"another process at work on this recording \(process {process.pid} "):
        record(data, tmp_path / "demos", 1, progress=False)
    workers = children(process.pid)
    process.kill()
    process.wait()
    # ... and afterwards free; no process stays behind.
    wait_for(lambda: not any(alive(pid) for pid in workers), "the orphans' end")
    with pytest.raises(UserError, match="unfinished"):
        Dataset.open(tmp_path / "demos")
    finished = {int(p.stem) for p in shards.glob("[0-9]*")}
    before = len(log.read_text().split())

    monkeypatch.setenv("EXPERT_LOG", str(log))
    record(data, tmp_path / "demos", 1, progress=False)
    again = {int(seed) - 2_000_000 for seed in log.read_text().split()[before:]}
    assert len(finished) >= 3
    assert again == set(range(8)) - finished
    record(data, tmp_path / "uninterrupted", 1, progress=False)
    assert files(tmp_path / "demos") == files(tmp_path / "uninterrupted")


def test_a_kill_while_the_data_set_is_written_costs_nothing(tmp_path, data, monkeypatch):
    def killed(*_, staging, **__):
        (staging / "data").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            record(data, tmp_path / "demos", 1, progress=False)
    monkeypatch.setenv("EXPERT_LOG", str(tmp_path / "log"))
    other = data.model_copy(update={"noise": 0.02})
    with pytest.raises(UserError, match="beginning of another recording"):
        record(other, tmp_path / "demos", 1, progress=False)
    assert record(data, tmp_path / "demos", 1, progress=False).episodes == 6
    assert not (tmp_path / "log").exists()


def test_a_damaged_episode_file_is_named(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recording, "write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(data, tmp_path / "demos", 1, progress=False)
    shard = tmp_path / "demos.partial/episodes/000002.parquet"
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=r"000002\.parquet: damaged"):
        record(data, tmp_path / "demos", 1, progress=False)
    shard.unlink()
    assert record(data, tmp_path / "demos", 1, progress=False).episodes == 6


def test_a_simulator_that_dies_is_told_and_what_is_finished_stays(tmp_path, data, monkeypatch):
    monkeypatch.setattr(protocols, "protocol", fake(crash=2_000_004))
    with pytest.raises(UserError, match="a recording process died"):
        record(data, tmp_path / "demos", 1, progress=False)
    assert len(list((tmp_path / "demos.partial/episodes").glob("[0-9]*"))) == 4


def test_no_expert_and_a_hopeless_expert(tmp_path, data, monkeypatch):
    monkeypatch.setattr(protocols, "protocol", fake(expert=False))
    with pytest.raises(UserError, match="without a scripted expert"):
        record(data, tmp_path / "none", 1, progress=False)
    monkeypatch.setattr(protocols, "protocol", fake(fail=1))
    with pytest.raises(UserError, match="the expert failed 21 of 21"):
        record(data, tmp_path / "hopeless", 1, progress=False)
    with pytest.raises(UserError, match="without a protocol"):
        record(DataSpec(folder="elsewhere"), tmp_path / "nothing", 1, progress=False)


@pytest.mark.sim
def test_grinningface_demonstrations(tmp_path):
    data = DataSpec(protocol="grinningface/place/train/v1", episodes=3, image_size=32)
    record(data, tmp_path / "one", 1, progress=False)
    record(data, tmp_path / "two", 2, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    dataset = Dataset.open(tmp_path / "one")
    released = dataset.actions[dataset.episode_to - 1, 6]
    assert released.tolist() == [1, 1, 1]
    assert (dataset.actions[dataset.episode_from, 6] == 0).all()
    images = dataset.images(np.arange(dataset.num_frames))
    assert images.shape[1:] == (32, 32, 3)
    assert images.std() > 10
    assert (images[dataset.episode_from] != images[dataset.episode_to - 1]).any(axis=(1, 2, 3)).all()
