"""The episode loop: same results however it is run, interrupted or troubled."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_sim import CONVENTION, FIRST_SEED, FakePolicy, FakeSim, protocol
from vlm4vla.cli import main
from vlm4vla.errors import UserError
from vlm4vla.evaluation.execution import blend, delay_opening
from vlm4vla.evaluation.rollout import TRIES, evaluate
from vlm4vla.serving import sources
from vlm4vla.serving.sources import Source
from vlm4vla.sims import protocols
from vlm4vla.sims.worker import Worker
from vlm4vla.studies.store import Store

TESTS = str(Path(__file__).parent)
EPISODES = 12


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "results.sqlite") as store:
        yield store


def run(store, run_id="run", policy=None, named=None, episodes=EPISODES, **options):
    options = {"image_size": 8, "workers": 2, "progress": False} | options
    return evaluate(policy or FakePolicy(), named or protocol(), episodes, store, run_id, **options)


def outcomes(results):
    """What must not depend on how an evaluation is run."""
    return [(r.episode, r.seed, r.success, r.steps, r.credits, r.instruction, r.fault) for r in results]


def alone(seed):
    """The same episode in this process, step by step."""
    sim, policy = FakeSim(), FakePolicy()
    sim.reset(seed)
    steps = 0
    while True:
        outcome = sim.execute(policy.predict([sim.observe()])[0].actions[:3])
        steps += outcome.steps
        if outcome.done:
            return outcome.success, steps


def test_results_are_those_of_a_plain_loop(store):
    results = run(store)
    assert [(r.success, r.steps) for r in results] == [alone(FIRST_SEED + i) for i in range(EPISODES)]
    assert 0 < sum(r.success for r in results) < EPISODES, "a test that could not see a difference"
    assert [r.seed for r in results] == [FIRST_SEED + i for i in range(EPISODES)]
    for r in results:
        assert r.timings.keys() == {"sim", "render", "infer", "wall"}
        assert r.timings["sim"] + r.timings["render"] + r.timings["infer"] <= r.timings["wall"]
        assert r.versions["numpy"] == np.__version__


def test_the_wall_time_of_an_episode_holds_all_its_parts(store):
    """Also of one that its worker began by itself, while the policy was busy with another's."""
    results = run(store, policy=FakePolicy(delay_s=0.1), named=protocol(reset_s=0.1))
    assert {min(r.timings["wall"] - r.timings["sim"] - r.timings["infer"], 0) for r in results} == {0}


def test_number_of_workers_does_not_matter(store):
    policy = FakePolicy(delay_s=0.1)  # several steps even of a busy machine
    assert outcomes(run(store, "one", workers=1)) == outcomes(run(store, "three", policy, workers=3))
    assert max(policy.batches) > 1, "waiting workers are served together"


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_go_on_by_themselves_but_for_the_last_episodes(store, monkeypatch, workers):
    asked, stored = [], []
    send, add = Worker.send, store.add
    monkeypatch.setattr(Worker, "send", lambda self, do, *a, **k: (asked.append(do), send(self, do, *a, **k))[1])
    monkeypatch.setattr(store, "add", lambda run_id, row: (stored.append(row.episode), add(run_id, row))[1])
    run(store, workers=workers)
    assert sorted(stored) == [*range(EPISODES)], "each once"
    assert workers <= asked.count("reset") < 3 * workers, "at the start, and where fewer episodes are left than workers"


def test_finished_episodes_are_not_repeated(store):
    first = run(store, episodes=5)
    policy = FakePolicy()
    assert run(store, policy=policy, episodes=5) == first
    assert policy.batches == []
    assert run(store, episodes=EPISODES)[:5] == first
    assert outcomes(store.results("run", "fake/line/v1")) == outcomes(run(store, "fresh"))


@pytest.mark.parametrize("how", ["crash", "hang", "raise"])
def test_a_troubled_episode_is_repeated(store, tmp_path, how):
    """Each kind of trouble, once in an episode's middle, leaves no trace in the result."""
    trouble = {str(FIRST_SEED + 2): how}
    troubled = run(store, "troubled", named=protocol(trouble=trouble, scar=str(tmp_path)), timeout_s=2.0)
    assert (tmp_path / str(FIRST_SEED + 2)).exists()
    assert outcomes(troubled) == outcomes(run(store, "calm"))


def test_a_lasting_fault_is_no_failure(store):
    named = protocol(trouble={str(FIRST_SEED + 1): "crash"})
    results = run(store, named=named)
    bad = results[1]
    assert bad.success is None
    assert "SIGABRT" in bad.fault
    assert "last words" in bad.fault
    assert all(r.success is not None for i, r in enumerate(results) if i != 1)

    policy = FakePolicy()
    mended = run(store, policy=policy)  # the same protocol name without the trouble
    assert outcomes(mended) == outcomes(run(store, "calm"))
    assert len(policy.batches) <= 4, "only the fault was tried again"


def test_a_fault_costs_three_starts(store, monkeypatch):
    starts = []
    plain = Worker.start
    monkeypatch.setattr(Worker, "start", lambda self: (starts.append(1), plain(self))[1])
    run(store, named=protocol(trouble={str(FIRST_SEED + 1): "crash"}), episodes=2, workers=1)
    assert len(starts) == TRIES


@pytest.fixture
def deaths(tmp_path):
    """A folder, and what lets so many starts of a simulator be killed, as a system short of memory does."""
    folder = tmp_path / "deaths"
    folder.mkdir()

    def kill(starts):
        for i in range(starts):
            (folder / str(i)).touch()
        return protocol(deaths=str(folder))

    return kill


def test_workers_killed_before_any_was_made_are_started_again(store, deaths):
    assert outcomes(run(store, "killed", named=deaths(2))) == outcomes(run(store, "calm"))


def test_workers_that_never_start_end_the_evaluation_after_three_starts_each(store, deaths, tmp_path):
    with pytest.raises(UserError, match=r"(?s)does not start.*SIGKILL.*fewer --workers"):
        run(store, named=deaths(20))
    assert len([*(tmp_path / "deaths").iterdir()]) == 20 - 2 * TRIES
    assert store.results("run", "fake/line/v1") == []


def test_a_worker_that_never_starts_leaves_its_episodes_to_the_others(store, deaths, monkeypatch, capfd):
    """Its episode is the others', whose numbers stay: no fault, and no other result."""
    workers, plain = [], Worker.__init__
    named = deaths(TRIES)

    def init(self, sim, kwargs, *options):
        workers.append(self)
        plain(self, sim, kwargs if len(workers) == 2 else {**kwargs, "deaths": None}, *options)

    monkeypatch.setattr(Worker, "__init__", init)
    results = run(store, "killed", FakePolicy(delay_s=0.1), named=named, workers=3)
    assert len(workers) == 3
    assert "given up (2 left)" in capfd.readouterr().err
    assert outcomes(results) == outcomes(run(store, "calm"))


def test_the_last_episode_does_not_wait_for_a_worker_that_never_starts(store, deaths, monkeypatch):
    workers, plain, named = [], Worker.__init__, deaths(TRIES)

    def init(self, sim, kwargs, *options):
        workers.append(self)
        plain(self, sim, kwargs if len(workers) == 2 else {**kwargs, "deaths": None}, *options)

    monkeypatch.setattr(Worker, "__init__", init)
    results = run(store, "killed", named=named, episodes=2)
    assert outcomes(results) == outcomes(run(store, "calm", episodes=2))


def test_a_simulator_that_starts_no_more_ends_the_evaluation_and_keeps_what_is_finished(store, deaths, monkeypatch):
    add, named = store.add, deaths(0)
    named = replace(named, sim_args={**named.sim_args, "trouble": {str(FIRST_SEED + 1): "crash"}})
    monkeypatch.setattr(store, "add", lambda run_id, row: (deaths(TRIES), add(run_id, row)))
    with pytest.raises(UserError, match="does not start"):
        run(store, named=named, workers=1)
    assert [r.episode for r in store.results("run", "fake/line/v1")] == [0]


def test_a_policy_sees_the_cameras_that_it_needs_and_no_others(store):
    class Seeing(FakePolicy):
        def predict(self, observations):
            seen.update(frozenset(observation.images) for observation in observations)
            return super().predict(observations)

    seen = set()
    plain = run(store, "plain", policy=Seeing())
    assert seen == {frozenset({"main"})}
    seen.clear()
    assert outcomes(run(store, "both", policy=Seeing(), cameras=["wrist"])) == outcomes(plain)
    assert seen == {frozenset({"main", "wrist"})}
    one_eyed = replace(protocol(), name="fake/one-eyed/v1", sim="fake_sim:OneEyed")
    assert len(run(store, named=one_eyed, episodes=1)) == 1
    with pytest.raises(UserError, match=r"(?s)renders the camera main alone.*main, wrist"):
        run(store, named=one_eyed, episodes=2, cameras=["main", "wrist"])


def test_what_cannot_work_is_refused_at_once(store):
    other = FakePolicy(replace(CONVENTION, gripper="1=closed,0=open"))
    with pytest.raises(UserError, match="gripper"):
        run(store, policy=other)
    assert other.batches == []
    with pytest.raises(UserError, match="action chunks of 2"):
        run(store, policy=FakePolicy(chunk=2))
    with pytest.raises(UserError, match="assets"):
        run(store, named=protocol(refuse=True))
    with pytest.raises(UserError, match="does not start"):
        run(store, named=protocol(no_such_argument=1))
    policy = FakePolicy()
    policy.predict = lambda observations: [
        replace(chunk, actions=chunk.actions * np.nan) for chunk in FakePolicy().predict(observations)
    ]
    with pytest.raises(UserError, match="not finite"):
        run(store, policy=policy)
    assert store.results("run", "fake/line/v1") == []


def test_film_strips_show_what_the_policy_saw(store, tmp_path):
    policy = FakePolicy()
    results = run(store, policy=policy, strips=tmp_path / "strips", num_strips=3)
    assert outcomes(results) == outcomes(run(store, "without"))
    assert len(list((tmp_path / "strips").iterdir())) == 6
    for result in results[:3]:
        about = json.loads((tmp_path / f"strips/fake-line-v1-{result.episode:04d}.json").read_text())
        assert (about["success"], about["seed"], about["steps"]) == (result.success, result.seed, result.steps)
        strip = np.asarray(Image.open(tmp_path / f"strips/fake-line-v1-{result.episode:04d}.png"))
        looks = -(-result.steps // 3)
        assert strip.shape == (8, 8 * (looks + 1), 3)
        assert about["frames"] == looks + 1, "the looks, and how it ended"
        sim = FakeSim()
        sim.reset(result.seed)
        np.testing.assert_array_equal(strip[:, :8], sim.observe().images["main"])


def test_videos_show_the_looks_and_the_end(store, tmp_path):
    av = pytest.importorskip("av")
    results = run(store, videos="failures", video_folder=tmp_path / "videos")
    assert outcomes(results) == outcomes(run(store, "without"))
    failed = [r for r in results if not r.success]
    assert failed
    names = {f"fake-line-v1-{r.episode:04d}.mp4" for r in failed}
    assert {path.name for path in (tmp_path / "videos").iterdir()} == names
    with av.open(str(tmp_path / "videos" / min(names))) as film:
        rate, frames = film.streams.video[0].average_rate, [frame.to_ndarray(format="rgb24") for frame in film.decode()]
    looks = 12 // 3 + 1
    assert rate == pytest.approx(CONVENTION.control_hz / 3, rel=1e-2), "as fast as it happened"
    assert len(frames) == looks + max(1, round(rate)), "the looks and the end, which stays for a second"
    caption = np.array([frame[384:].astype(int) for frame in frames])
    assert (caption[0] < 128).any(), "a caption"
    assert np.abs(caption[0] - caption[-1]).max() > 100, "another step, and the outcome"

    run(store, "all", videos="all", video_folder=tmp_path / "all")
    assert len(list((tmp_path / "all").iterdir())) == EPISODES


def test_a_film_is_there_before_its_row(store, tmp_path, monkeypatch, capfd):
    """A kill between the two repeats the episode; one that is finished without a film is told."""
    pytest.importorskip("av")
    films, add = tmp_path / "videos", store.add

    def killed(run_id, result):
        assert (films / f"fake-line-v1-{result.episode:04d}.mp4").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(store, episodes=2, workers=1, videos="all", video_folder=films)
    assert store.results("run", "fake/line/v1") == []
    monkeypatch.setattr(store, "add", add)
    run(store, episodes=2, videos="all", video_folder=films)
    assert len(list(films.iterdir())) == 2
    run(store, episodes=2, videos="all", video_folder=films)
    assert capfd.readouterr().err == ""
    (films / "fake-line-v1-0001.mp4").unlink()
    run(store, episodes=2, videos="all", video_folder=films)
    assert f"without a video in {films}: 1 " in capfd.readouterr().err


def test_ensembling_averages_the_predictions_of_a_step(store):
    old, new = np.full((4, 7), 1.0), np.full((4, 7), 3.0)
    old[:, -1], new[:, -1] = 1.0, 0.0
    both = blend([(0, old), (2, new)], 2, 4, decay=0.5)
    weight = np.exp(-0.5)
    assert both.shape == (4, 7)
    np.testing.assert_allclose(both[:2, :6], (1.0 + 3.0 * weight) / (1 + weight), rtol=1e-6)
    np.testing.assert_array_equal(both[2:, :6], 3.0)  # where the old chunk does not reach
    np.testing.assert_array_equal(both[:, -1], [1, 1, 0, 0])  # the older, heavier vote

    named = protocol("fake/line/v1+ensemble=0.1", ensemble=0.1)
    results = run(store, named=named)
    assert outcomes(results) == outcomes(run(store, "alone", named=named, workers=1))
    assert [r.steps for r in results] != [r.steps for r in run(store, "plain")], "it acts otherwise"


def test_a_sticky_gripper_opens_at_the_second_request_in_a_row(store, monkeypatch):
    """Whatever the chunks' lengths, counted over an episode; everything else of an action stays."""
    asked = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1], np.float32)
    wanted = [0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    actions = np.tile(np.arange(7, dtype=np.float32), (12, 1))
    actions[:, -1] = asked
    for size in (1, 3, 4, 12):
        count, done = 0, []
        for start in range(0, 12, size):
            part, count = delay_opening(actions[start : start + size], count, 2)
            done.append(part)
        whole = np.concatenate(done)
        assert whole[:, -1].tolist() == wanted
        np.testing.assert_array_equal(whole[:, :-1], actions[:, :-1])
    assert actions[:, -1].tolist() == asked.tolist(), "the prediction itself is untouched"

    sent, send = [], Worker.send
    monkeypatch.setattr(
        Worker,
        "send",
        lambda self, do, actions=None, **more: (sent.append(actions), send(self, do, actions, **more))[1],
    )

    class Opening(FakePolicy):
        def predict(self, observations):
            return [
                replace(c, actions=c.actions + np.eye(7, dtype=np.float32)[6]) for c in super().predict(observations)
            ]

    def grippers(name, **options):
        sent.clear()
        run(store, name, Opening(), replace(protocol(f"fake/{name}/v1"), **options), episodes=2, workers=1)
        return [part[:, -1].tolist() for part in sent if part is not None]

    plain, sticky = grippers("plain"), grippers("sticky", open_after=2)
    assert {tuple(part) for part in plain} == {(1.0, 1.0, 1.0)}
    firsts = [i for i, part in enumerate(sticky) if part != [1.0, 1.0, 1.0]]
    assert [sticky[i] for i in firsts] == [[0.0, 1.0, 1.0]] * 2, "each episode begins with a count of 0"
    assert firsts[0] == 0


def test_a_protocol_keeps_its_meaning_in_a_store(store):
    run(store, episodes=1)
    assert store.protocols()["fake/line/v1"]["execute"] == 3
    with pytest.raises(UserError, match='"execute": 2'):
        run(store, named=protocol(execute=2), episodes=1)
    with pytest.raises(UserError, match="at most 5"):
        run(store, named=protocol("fake/short/v1", num_episodes=5), episodes=6)


def test_an_evaluation_runs_once_at_a_time(store):
    process = in_process(store.path, "run", 0.05)
    while not store.results("run", "fake/line/v1"):
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {process.pid} holds"):
        run(store)
    assert process.poll() is None
    process.communicate()
    assert run(store) == store.results("run", "fake/line/v1")


SCRIPT = """
import sys
from fake_sim import FakePolicy, protocol
from vlm4vla.evaluation.rollout import evaluate
from vlm4vla.studies.store import Store
path, run_id, step_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
evaluate(FakePolicy(), protocol(step_s=step_s), 12, Store(path), run_id, image_size=8, workers=2, progress=False)
"""


def in_process(path, run_id, step_s):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), run_id, str(step_s)], stderr=subprocess.PIPE)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_anywhere_it_goes_on(store, number):
    process = in_process(store.path, "run", 0.02)
    while not (4 <= len(store.results("run", "fake/line/v1")) <= 9):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    assert workers
    process.send_signal(number)
    process.communicate()
    kept = store.results("run", "fake/line/v1")
    assert 4 <= len(kept) < EPISODES
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)

    results = run(store)
    assert [r for r in results if r in kept] == kept, "finished rows are untouched"
    assert outcomes(results) == outcomes(run(store, "fresh"))


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_evaluations_share_a_store(tmp_path):
    path = tmp_path / "fresh" / "results.sqlite"
    processes = [in_process(path, name, 0.0) for name in ("a", "b")]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    with Store(path) as store:
        assert store.evaluated() == [("a", "fake/line/v1", 12, 0), ("b", "fake/line/v1", 12, 0)]
        rows = [outcomes(store.results(name, "fake/line/v1")) for name in ("a", "b")]
    assert rows[0] == rows[1]


def test_progress_shows_success_with_its_interval(store, capsys):
    results = run(store, progress=True)
    successes = sum(r.success for r in results)
    shown = capsys.readouterr().err
    assert f"success {successes / EPISODES:.0%} [" in shown
    assert f"{EPISODES}/{EPISODES}" in shown


@pytest.fixture
def command(monkeypatch, tmp_path):
    """``vlm4vla eval`` of the fake policy, with how many seeds crash its simulator -> exit status."""

    @contextmanager
    def opened(*_):
        yield Source(FakePolicy(), "fake", 4, 8)

    def evaluation(crashes, *options):
        trouble = {str(FIRST_SEED + i): "raise" for i in range(crashes)}
        monkeypatch.setattr(protocols, "protocol", lambda name: protocol(num_episodes=6, trouble=trouble))
        monkeypatch.setattr(sys, "argv", ["vlm4vla", "eval", "it", "--protocol", "fake/line/v1", *options])
        try:
            main()
        except SystemExit as stopped:
            return stopped.code
        return 0

    monkeypatch.setattr(sources, "opened", opened)
    monkeypatch.chdir(tmp_path)
    return evaluation


def test_an_evaluation_with_faults_says_so_and_ends_with_status_2(command, capfd):
    assert command(2) == 2
    said = capfd.readouterr()
    assert "n = 5, faults: 1\n" in said.out
    assert "1 of 6 episodes that the infrastructure failed" in said.err
    assert "the first, episode 1 of fake/line/v1: RuntimeError: the physics exploded\n" in said.err
    assert "next: the same command again" in said.err
    assert command(0) == 0
    assert "n = 6\n" in capfd.readouterr().out


def test_an_evaluation_runs_all_episodes_of_a_short_protocol_and_no_more(command, capfd):
    assert command(0) == 0
    assert "n = 6\n" in capfd.readouterr().out
    assert command(0, "--episodes", "7") == 2
    assert "--episodes 6" in capfd.readouterr().err
    assert protocols.Protocol("any", "a simulator").episodes(None) == 100
