"""The worker process and its protocol."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fake_sim import CONVENTION
from vlm4vla.convention import Convention
from vlm4vla.errors import UserError
from vlm4vla.sims.backend import choose_backend
from vlm4vla.sims.frames import MAX_ARRAYS, PREFIX, FrameReader, frame
from vlm4vla.sims.grinningface import emoji
from vlm4vla.sims.worker import Worker, WorkerFault

TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)


@pytest.fixture
def start():
    workers = []

    def make(timeout_s=30.0, **kwargs):
        workers.append(Worker("fake_sim:FakeSim", kwargs, timeout_s))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process ends (a zombie has ended)."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def read_frame(data: bytes):
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        return FrameReader(reading).read()
    finally:
        os.close(reading)


def test_frames_return_what_was_sent():
    arrays = {
        "image/main": np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)[:, ::-1],
        "actions": np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32),
        "empty": np.zeros((0, 7), np.float32),
    }
    header, received = read_frame(b"".join(frame({"do": "x", "flag": np.bool_(True), "é": [1, None]}, arrays)))
    assert header == {"do": "x", "flag": True, "é": [1, None]}
    assert received.keys() == arrays.keys()
    for name, value in arrays.items():
        assert received[name].dtype == value.dtype
        np.testing.assert_array_equal(received[name], value)


@pytest.mark.parametrize(
    "data",
    [
        b"hello world, this is a library printing",
        PREFIX.pack(10, MAX_ARRAYS + 1) + b"{}",
        PREFIX.pack(0, 5) + b"12345",
        PREFIX.pack(4, 0) + b"[1] ",
        PREFIX.pack(64, 0) + b'{"arrays": [["a", "|O", [1]]]}'.ljust(64),
        PREFIX.pack(64, 4) + b'{"arrays": [["a", "<f4", [-1]]]}'.ljust(64) + b"1234",
        PREFIX.pack(64, 4) + b'{"arrays": [["a", "<f4", [2]]]}'.ljust(64) + b"1234",
        PREFIX.pack(64, 8) + b'{"arrays": [["a", "<f4", [1]]]}'.ljust(64) + b"12345678",
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 (several messages, one meaning)
        read_frame(data)


def test_objects_do_not_travel():
    with pytest.raises(ValueError, match="dtype object"):
        frame({}, {"a": np.array([{}], dtype=object)})


def test_worker_runs_an_episode(start):
    worker = start()
    made = worker.receive().made
    assert Convention.from_dict(made["convention"]) == CONVENTION
    assert made["versions"]["numpy"] == np.__version__

    first = worker.ask("reset", seed=3, look=True)
    assert first.outcome is None
    assert first.observation.images["main"].shape == (8, 8, 3)
    assert first.observation.instruction == "go to 0 (seed 3)"
    assert first.seconds.keys() == {"sim", "render"}

    step = worker.ask("execute", actions=np.zeros((2, 7), np.float32))
    assert (step.outcome.steps, step.outcome.done, step.observation) == (2, False, None)
    assert "render" not in step.seconds
    end = worker.ask("execute", actions=np.zeros((50, 7), np.float32), look=True)
    assert (end.outcome.steps, end.outcome.done, end.outcome.success) == (10, True, False)
    assert end.outcome.credits == {"execution": True, "recognition": False}
    assert end.observation is None, "nothing is rendered after the end unless asked for"
    assert worker.ask("observe").observation is not None

    again = worker.ask("reset", seed=3, look=True).observation
    np.testing.assert_array_equal(again.images["main"], first.observation.images["main"])


def test_a_worker_goes_on_with_the_next_episode_by_itself(start):
    worker = start()
    worker.receive()
    seen = worker.ask("reset", seed=4, look=True).observation
    worker.ask("reset", seed=3)
    assert worker.ask("execute", actions=np.zeros((2, 7), np.float32), look=True, then=4).observation is not None
    end = worker.ask("execute", actions=np.zeros((50, 7), np.float32), look=True, then=4)
    assert (end.outcome.done, end.observation) == (True, None)
    worker.expect()
    begun = worker.receive()
    assert begun.outcome is None
    assert begun.observation.instruction == seen.instruction
    np.testing.assert_array_equal(begun.observation.images["main"], seen.images["main"])


@pytest.mark.sim
def test_the_worker_names_font_and_backend():
    """Pixels depend on both."""
    worker = Worker("grinningface", {"image_size": 32})
    try:
        found = worker.receive().made["versions"]
    finally:
        worker.kill()
    assert found["OpenGL"] == choose_backend()
    name, digest = found["emoji font"].split()
    content = Path(emoji.font().path).read_bytes()
    assert Path(emoji.font().path).name == name
    assert hashlib.sha256(content).hexdigest().startswith(digest)
    assert len(digest) == 10
    assert "mujoco" in found


def test_worker_has_no_torch():
    code = "import vlm4vla.sims.worker, vlm4vla.evaluation.rollout, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_large_images_cross(start):
    worker = start(image_size=1024)  # 3 MiB: three times what a pipe holds at best
    worker.receive()
    assert worker.ask("reset", seed=1, look=True).observation.images["main"].shape == (1024, 1024, 3)


def test_errors_are_told_apart(start):
    worker = start()
    worker.receive()
    with pytest.raises(WorkerFault, match="negative seed"):
        worker.ask("reset", seed=-1)
    worker.ask("reset", seed=1)  # it lives on

    with pytest.raises(UserError, match="fetch them"):
        start(refuse=True).receive()

    worker = start(trouble={"1": "crash"})
    worker.receive()
    worker.ask("reset", seed=1)
    worker.ask("execute", actions=np.zeros((1, 7), np.float32))
    with pytest.raises(WorkerFault, match=r"(?s)ended with signal SIGABRT.*last words of the simulator"):
        worker.ask("execute", actions=np.zeros((1, 7), np.float32))
    worker.restart()
    assert worker.receive().made
    assert worker.ask("reset", seed=2, look=True).observation is not None


def test_an_unknown_simulator_is_the_users_to_mend():
    worker = Worker("grinningfase", {})
    with pytest.raises(UserError, match="nearest: grinningface"):
        worker.receive()
    worker.kill()


def test_a_hanging_worker_is_given_up(start):
    worker = start(timeout_s=30.0, trouble={"1": "hang"})
    worker.receive()
    worker.ask("reset", seed=1)
    worker.ask("execute", actions=np.zeros((1, 7), np.float32))
    worker.send("execute", actions=np.zeros((1, 7), np.float32))
    worker.deadline = time.monotonic() + 0.3
    with pytest.raises(WorkerFault, match="no reply"):
        worker.receive()
    pid = worker.pid
    worker.kill()
    assert gone(pid)


def test_workers_end_with_their_parent():
    """Killed with -9, the parent closes nothing in order: one worker idles, the other is stuck in its simulator."""
    code = """if True:
        import numpy as np
        from vlm4vla.sims.worker import Worker
        idle = Worker("fake_sim:FakeSim", {})
        stuck = Worker("fake_sim:FakeSim", {"trouble": {"1": "hang"}})
        idle.receive(); stuck.receive()
        stuck.ask("reset", seed=1)
        stuck.ask("execute", actions=np.zeros((1, 7), np.float32))
        stuck.send("execute", actions=np.zeros((1, 7), np.float32))
        print(idle.pid, stuck.pid, flush=True)
        input()
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert all(gone(pid) for pid in pids)


def test_an_interpreter_that_is_no_program_is_refused(tmp_path):
    (tmp_path / "python").write_text("not a program\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match="which is no program"):
        Worker("fake_sim:FakeSim", {}, python=str(tmp_path / "python"))


@pytest.mark.parametrize("shortage", [errno.ENOMEM, errno.EAGAIN])
def test_a_system_without_room_for_a_process_is_a_fault_that_may_pass(start, monkeypatch, shortage):
    def refused(*_, **options):
        raise OSError(shortage, os.strerror(shortage))

    begun = start()
    begun.receive()
    with monkeypatch.context() as short:
        short.setattr(subprocess, "Popen", refused)
        begun.restart()
        workers = (begun, start())
        for worker in workers:
            with pytest.raises(WorkerFault, match=os.strerror(shortage)):
                worker.receive()
            worker.close()
    for worker in workers:
        worker.restart()
        assert worker.receive().made
