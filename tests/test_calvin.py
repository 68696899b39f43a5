"""CALVIN. What needs the simulator runs where ``vlm4vla sims setup calvin`` was done."""

import json
from collections import Counter

import numpy as np
import pytest

import raw_data
from simulated import run_in
from vlm4vla.data.convert import calvin as raw
from vlm4vla.data.convert.base import convert
from vlm4vla.data.lerobot import Dataset
from vlm4vla.sims import calvin, environments
from vlm4vla.sims.check import check_sim
from vlm4vla.sims.protocols import protocol
from vlm4vla.sims.remote import Remote
from vlm4vla.studies.stats import credit_lines
from vlm4vla.types import EpisodeResult

missing = environments.missing("calvin")
simulated = pytest.mark.skipif(missing is not None, reason=f"{missing}: vlm4vla sims setup calvin --assets CLONE")


def test_the_hash_is_pyhashs_and_not_the_textbooks():
    assert calvin.fnv1_32("") == 0
    assert calvin.fnv1_32("a") == (0x61 * 0x01000193) % 2**32
    assert calvin.fnv1_32("ab") == (((((0x61 * 0x01000193) % 2**32 * 0x01000193) % 2**32) ^ 0x62) * 0x01000193) % 2**32
    textbook = 0x811C9DC5
    for byte in b"ab":
        textbook = (textbook * 0x01000193) % 2**32 ^ byte
    assert calvin.fnv1_32("ab") != textbook


def test_the_chains_are_possible_and_start_as_published():
    chains = calvin.chains()
    assert len(chains) == calvin.NUM_CHAINS
    assert chains[0][1] == [
        "rotate_blue_block_right",
        "move_slider_right",
        "lift_red_block_slider",
        "place_in_slider",
        "turn_off_lightbulb",
    ]
    assert len({task for _, tasks in chains for task in tasks}) == 34
    for condition, tasks in chains:
        assert tuple(condition) == calvin.CONDITION
        assert len(tasks) == len(set(tasks)) == calvin.CHAIN
        blocks = Counter(condition[f"{colour}_block"] for colour in ("red", "blue", "pink"))
        assert blocks["table"] in (1, 2)
        assert blocks["slider_left"] <= 1
        assert blocks["slider_right"] <= 1
        slider, first = condition["slider"], tasks[0]
        assert first not in ("place_in_slider", "place_in_drawer", "stack_block", "unstack_block")
        assert first != f"move_slider_{slider}", "what is done already is not asked for"


def test_initial_states_follow_from_the_condition_alone():
    before = np.random.get_state()[1].copy()
    for condition, _ in calvin.chains()[:200]:
        robot, scene = calvin.initial_state(condition)
        again = calvin.initial_state(dict(condition))
        np.testing.assert_array_equal(scene, again[1])
        assert robot.shape == (15,)
        places = {block: tuple(scene[i : i + 3]) for block, i in (("red", 6), ("blue", 12), ("pink", 18))}
        assert len(set(places.values())) == 3, "blocks do not share a place"
        for block, place in places.items():
            where = condition[f"{block}_block"]
            assert place in (calvin.TABLE if where == "table" else [calvin.PLACES[where]])
        assert (scene[0] > 0, scene[1] > 0) == (condition["slider"] == "left", condition["drawer"] == "open")
        assert (scene[4], scene[5]) == (condition["lightbulb"], condition["led"])
        assert all(abs(scene[i] - np.pi / 2) < np.pi / 8 for i in (11, 17, 23))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_lengths_are_reported_with_their_interval():
    def episode(i, length):
        credits = {"length": length} | {f"success_{n}": length >= n for n in range(1, 6)}
        return EpisodeResult("calvin_abc_d/v1", i, i, length == 5, 100, credits)

    lines = credit_lines([episode(i, length) for i, length in enumerate([5, 3, 0, 1] * 10)])
    assert lines[0].startswith("success_1 75% [")
    assert lines[4].startswith("success_5 25% [")
    assert lines[5].startswith("average length 2.25 [")
    assert protocol("calvin_abc_d/v1").num_episodes == 1000


SOLVED = """
import json
import numpy as np
from vlm4vla.sims.calvin import Calvin, chains
sim = Calvin(renderer="tiny")
seed = next(i for i, (_, tasks) in enumerate(chains()) if tasks[0] == "open_drawer")
sim.reset(seed)
first, hold = sim.observe().instruction, np.array([[0, 0, 0, 0, 0, 0, 1.0]] * 8)
before = sim.execute(hold)
next(door for door in sim._env.scene.doors if "drawer" in door.name).reset(0.22)
after = sim.execute(hold)
print(json.dumps([before.credits["length"], before.steps, after.credits["length"], after.steps, after.done,
                  first, sim.observe().instruction]))
"""


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_an_instruction_counts_when_its_task_is_done_and_cuts_the_chunk():
    said = run_in("calvin", SOLVED)
    told = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    assert told[:5] == [0, 8, 1, 1, False]
    assert told[5] == "pull the handle to open the drawer"
    assert told[6] != told[5]


RECORDED = """
import sys
import numpy as np
from vlm4vla.sims.calvin import Calvin
sim = Calvin(renderer="tiny")
sim.reset(3)
rng = np.random.default_rng(7)
actions = np.repeat(rng.uniform(-0.8, 0.8, (10, 7)), 4, 0)  # forty steps that wander
actions[:, 6] = np.where(np.arange(40) < 25, 1, -1)
rows = []
seen = sim._env.get_obs()
for action in [*actions, actions[-1]]:
    rows.append({"robot_obs": seen["robot_obs"], "scene_obs": seen["scene_obs"],
                 "rgb_static": seen["rgb_obs"]["rgb_static"], "rel_actions": action})
    seen, *_ = sim._env.step(action)  # CALVIN's own: renders at every step
np.savez(sys.argv[1], **{key: np.stack([row[key] for row in rows]) for key in rows[0]})
"""


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_converted_demonstrations_played_open_loop_reach_the_same_end(tmp_path):
    """Recorded by CALVIN's own environment in its raw layout, converted, played by our simulator."""
    run_in("calvin", RECORDED, tmp_path / "recorded.npz")
    with np.load(tmp_path / "recorded.npz") as file:
        recorded = dict(file)
    steps = len(recorded["rel_actions"]) - 1
    raw_data.calvin(tmp_path / "raw", [(0, steps - 1, "wander")], {key: rows[:-1] for key, rows in recorded.items()})
    convert(raw.Calvin(tmp_path / "raw"), tmp_path / "out", 1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    sim = Remote("calvin", {"renderer": "tiny"})
    assert dataset.convention == sim.convention
    sim.reset(3)
    start = sim.observe()
    np.testing.assert_allclose(dataset.states[0], start.state, atol=1e-5)
    film = dataset.images(np.array([0]))[0].astype(int)
    assert np.abs(film - start.images["main"]).mean() < 5, "as the simulator shows it, but for the film's losses"

    outcome = sim.execute(dataset.actions)
    end = sim.observe()
    sim.close()
    assert outcome.steps == steps
    np.testing.assert_allclose(end.state, recorded["robot_obs"][-1], atol=1e-5)
    assert np.linalg.norm(end.state[:3] - start.state[:3]) > 0.05, "it went somewhere"
    assert np.abs(recorded["rgb_static"][-1].astype(int) - end.images["main"]).mean() < 0.01


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_calvin_keeps_the_simulator_protocol():
    check_sim("calvin")
