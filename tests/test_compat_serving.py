"""The real clients of openpi and vla-eval drive the server: ``make compat`` installs both."""

import numpy as np
import pytest

from fake_sim import FIRST_SEED, FakePolicy, FakeSim
from policy_server import expected, picture, running, service
from vlm4vla.sims.protocols import protocol

pytestmark = pytest.mark.compat
MISSING = "install it: make compat"


@pytest.fixture
def openpi_client():
    return pytest.importorskip("openpi_client.websocket_client_policy", reason=MISSING).WebsocketClientPolicy


@pytest.fixture
def vla_eval():
    return pytest.importorskip("vla_eval.api", reason=MISSING)


@pytest.mark.filterwarnings("ignore:connect")
def test_openpi_client(openpi_client):
    with running(token="sesame") as server:
        client = openpi_client("127.0.0.1", server.server.ports["openpi"], api_key="sesame")
        assert client.get_server_metadata()["vlm4vla"]["policy"] == "fake"
        for shade in (30, 200):
            reply = client.infer(
                {"observation/image": picture(shade), "observation/state": np.zeros(8), "prompt": "go"}
            )
            np.testing.assert_array_equal(reply["actions"], expected(shade))
        with pytest.raises(RuntimeError, match="a sentence"):
            client.infer({"observation/image": picture()})


def harness(vla_eval, server, folder, episodes, **benchmark):
    """A whole evaluation by vla-eval's own orchestrator; the success of each episode."""
    config = {
        "output_dir": str(folder),
        "benchmarks": [{"benchmark": "vla_eval_sim:SimBenchmark", "episodes_per_task": episodes, "params": benchmark}],
    }
    (result,) = vla_eval.run(config, server_url=server.url("vla-eval"), docker=False)
    (task,) = result["tasks"]
    assert not any(episode.get("failure_reason") for episode in task["episodes"]), task
    return [(bool(episode["metrics"]["success"]), episode["steps"]) for episode in task["episodes"]]


def test_vla_eval_runs_a_whole_evaluation(vla_eval, tmp_path):
    policy = FakePolicy()
    with running(service(policy, execute=3)) as server:
        sim = {"sim": "fake_sim:FakeSim", "sim_args": {}, "first_seed": FIRST_SEED, "max_steps": 12}
        ends = harness(vla_eval, server, tmp_path, 8, **sim)
    assert ends == [alone(FIRST_SEED + i) for i in range(8)]
    assert 0 < sum(success for success, _ in ends) < 8, "a test that could not see a difference"


def alone(seed):
    """The same episode in this process."""
    sim, policy, steps = FakeSim(), FakePolicy(), 0
    sim.reset(seed)
    while True:
        outcome = sim.execute(policy.predict([sim.observe()])[0].actions[:3])
        steps += outcome.steps
        if outcome.done:
            return outcome.success, steps


@pytest.mark.sim
def test_vla_eval_agrees_with_our_own_loop_about_a_checkpoint(vla_eval, tmp_path, policy_folder):
    from vlm4vla.evaluation.rollout import evaluate
    from vlm4vla.serving.service import Service
    from vlm4vla.serving.sources import checkpoint
    from vlm4vla.studies.store import Store

    named = protocol("grinningface/place/val/dev")
    source = checkpoint(str(policy_folder), "cpu")
    with Store(tmp_path / "results.sqlite") as store:
        options = {"image_size": source.image_size, "workers": 1, "progress": False}
        ours = evaluate(source.policy, named, 2, store, "ours", **options)
    with running(Service(source, form="native", execute=named.execute)) as server:
        sim = {"sim": named.sim, "sim_args": named.sim_args | {"image_size": source.image_size}}
        theirs = harness(vla_eval, server, tmp_path, 2, **sim, first_seed=named.first_seed, max_steps=named.max_steps)
    assert theirs == [(result.success, result.steps) for result in ours]


def test_vla_eval_stops_where_its_benchmark_has_no_form(vla_eval, tmp_path, caplog):
    """The whole evaluation, so that no rate comes of it. The reason is in the server's log: its client shows none."""
    sim = {"sim": "fake_sim:FakeSim", "sim_args": {}, "first_seed": FIRST_SEED, "max_steps": 12}
    with running(service(form=None)) as server, pytest.raises(RuntimeError, match="Expected HELLO"):
        harness(vla_eval, server, tmp_path, 1, **sim)
    assert "one of the forms of this policy, chosen for such clients: native" in caplog.text
    assert not list(tmp_path.rglob("*aggregate*"))
