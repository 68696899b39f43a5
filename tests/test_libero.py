"""LIBERO. What needs the simulator runs where ``vlm4vla sims setup libero`` was done."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest

import raw_data
from simulated import run_in
from vlm4vla.convention import LIBERO
from vlm4vla.data.convert import libero as raw
from vlm4vla.data.convert.base import convert
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.evaluation.rollout import evaluate
from vlm4vla.sims import environments, libero
from vlm4vla.sims.protocols import protocol
from vlm4vla.sims.remote import Remote
from vlm4vla.studies.store import Store
from vlm4vla.types import ActionChunk

missing = environments.missing("libero")
simulated = pytest.mark.skipif(missing is not None, reason=f"{missing}: vlm4vla sims setup libero --assets FOLDER")


def test_instructions_are_those_of_the_file_names():
    assert libero.instruction("KITCHEN_SCENE3_turn_on_the_stove") == "turn on the stove"
    assert libero.instruction("LIVING_ROOM_SCENE10_close_the_drawer") == "close the drawer"
    assert libero.instruction("push_the_plate_to_the_front_of_the_stove") == "push the plate to the front of the stove"


def test_axis_angles_are_not_folded():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(libero.axis_angle(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
    np.testing.assert_allclose(libero.axis_angle(np.array([0, half, 0, -half])), [0, 3 * np.pi / 2, 0])
    np.testing.assert_array_equal(libero.axis_angle(np.array([0.0, 0, 0, 1])), [0, 0, 0])


def states_file(path, value, protocol=2):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


def test_initial_states_are_read_and_nothing_else_is(tmp_path):
    wanted = np.random.default_rng(0).normal(size=(50, 47))
    # NumPy names its module otherwise since version 2; LIBERO's files are older.
    raw = pickle.dumps(wanted, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = states_file(tmp_path / "good", raw)
    np.testing.assert_array_equal(libero.initial_states(path), wanted)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'carried out'}",)

    refused = {
        "evil": Evil(),
        "hidden": [wanted, Evil()],
        "floats": wanted.astype(np.float32),
        "list": [1.0, 2.0],
        "bytes": b"no pickle",
        "cut": raw[:-400],
        "short": raw.replace(b"K2K/", b"K2K."),
    }
    assert refused["short"] != raw
    for name, value in refused.items():
        with pytest.raises(UserError, match="install hf-libero"):
            libero.initial_states(states_file(tmp_path / name, value))
    assert not (tmp_path / "carried out").exists()
    (tmp_path / "text").write_text("no zip file")
    for name in ("text", "absent"):
        with pytest.raises(UserError, match="initial states"):
            libero.initial_states(tmp_path / name)


def test_protocols_are_the_published_ones():
    named = protocol("libero_10/v1+execute=8")
    assert (named.max_steps, named.num_episodes, named.execute) == (520, 500, 8)
    assert protocol("libero_90/published/v1").num_episodes == 4500
    assert [protocol(f"{suite}/v1").max_steps for suite in libero.SUITES] == [220, 280, 300, 520, 400]


class Hold:
    """Stays where it is, gripper open."""

    convention = LIBERO

    def predict(self, observations):
        chunk = np.zeros((8, 7), np.float32)
        chunk[:, -1] = 1
        return [ActionChunk(chunk, LIBERO) for _ in observations]


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_episodes_depend_on_their_seed_alone(tmp_path):
    """Two workers or one, in whichever order and whatever went before: the same pixels and states."""
    named = protocol("libero_10/v1+execute=8")

    def seen(order):
        sim = Remote("libero", named.sim_args)
        looks = {}
        for seed in order:
            sim.reset(seed)
            sim.execute(np.full((3, 7), 0.3))
            looks[seed] = sim.observe()
        sim.close()
        return looks

    first, second = seen([0, 13, 3]), seen([3, 0])
    for seed in (0, 3):
        np.testing.assert_array_equal(first[seed].images["main"], second[seed].images["main"])
        np.testing.assert_array_equal(first[seed].state, second[seed].state)
    assert first[3].instruction == first[13].instruction
    assert (first[3].images["main"] != first[13].images["main"]).any(), "another initial state"


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_the_published_order_is_the_same_for_a_worker_that_was_not_there():
    named = protocol("libero_10/published/v1")

    def seen(order):
        sim = Remote("libero", named.sim_args)
        for seed in order:
            sim.reset(seed)
        observation = sim.observe()
        sim.close()
        return observation

    whole, alone = seen([100, 101, 102]), seen([102])
    np.testing.assert_array_equal(whole.images["main"], alone.images["main"])
    np.testing.assert_array_equal(whole.state, alone.state)


PUBLISHED = """
import numpy as np
from vlm4vla.sims.libero import initial_states

def published(sim):
    # The published way to the start of episode 0 of sim: cameras are rendered at every step.
    from libero.libero.envs import OffScreenRenderEnv
    name = sim._names[0]
    np.random.seed(0)
    env = OffScreenRenderEnv(bddl_file_name=str(sim._root / "bddl_files/libero_10" / f"{name}.bddl"),
                             camera_heights=256, camera_widths=256)
    env.env.object_property_initializers.clear()
    np.random.seed(0)
    env.reset()
    return env, env.set_init_state(initial_states(sim._root / "init_files/libero_10" / f"{name}.pruned_init")[0])
"""

COMPARE = """
import json, sys
from vlm4vla.sims.libero import Libero, SETTLE_STEPS
sim = Libero(cameras=["main", "wrist"])
sim.reset(0)
sim.execute(np.full((5, 7), 0.4))
ours = sim.observe()
sim.close()
env, obs = published(sim)
for action in [[0.0] * 6 + [-1.0]] * SETTLE_STEPS + [[0.4] * 6 + [1.0]] * 5:
    obs, reward, done, info = env.step(action)
pixels = {"main": obs["agentview_image"], "wrist": obs["robot0_eye_in_hand_image"]}
unlike = {name: int(np.abs(image[::-1, ::-1].astype(int) - ours.images[name]).max()) for name, image in pixels.items()}
state = np.concatenate([obs["robot0_eef_pos"], obs["robot0_gripper_qpos"]])
print(json.dumps([unlike, float(np.abs(state - ours.state[[0, 1, 2, 6, 7]]).max()), "torch" in sys.modules]))
"""


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_pixels_and_states_are_those_of_an_environment_that_renders_every_step():
    told = run_in("libero", PUBLISHED + COMPARE)
    pixels, state, torch = json.loads(told.splitlines()[-1])
    assert (pixels, torch) == ({"main": 0, "wrist": 0}, False)
    assert state < 1e-6, "float32"


RECORDED = """
import sys
from vlm4vla.sims.libero import Libero, SETTLE_STEPS, axis_angle
env, obs = published(Libero())
# As LIBERO's demonstrations were made: what is seen before each action.
for _ in range(SETTLE_STEPS):
    obs, *_ = env.step([0.0] * 6 + [-1.0])
rng = np.random.default_rng(7)
actions = np.repeat(rng.uniform(-0.8, 0.8, (10, 7)), 4, 0)  # forty steps that wander
actions[:20, 2] = -0.7  # down to the table and what stands there
actions[:, 6] = np.where(np.arange(40) < 25, -1, 1)
rows = []
for action in [*actions, None]:
    rows.append({"agentview_rgb": obs["agentview_image"], "eye_in_hand_rgb": obs["robot0_eye_in_hand_image"],
                 "ee_pos": obs["robot0_eef_pos"], "ee_ori": axis_angle(obs["robot0_eef_quat"]),
                 "gripper_states": obs["robot0_gripper_qpos"]})
    if action is not None:
        obs, *_ = env.step(action)
np.savez(sys.argv[1], actions=actions, **{key: np.stack([row[key] for row in rows]) for key in rows[0]})
"""


@pytest.mark.sim
@pytest.mark.slow
@simulated
def test_converted_demonstrations_played_open_loop_reach_the_same_end(tmp_path):
    """Recorded by LIBERO's own environment in its raw layout, converted, played by our simulator."""
    run_in("libero", PUBLISHED + RECORDED, tmp_path / "recorded.npz")
    with np.load(tmp_path / "recorded.npz") as file:
        recorded = dict(file)
    actions = recorded.pop("actions")
    named = protocol("libero_10/v1")
    sim = Remote("libero", named.sim_args)
    sim.reset(0)
    start = sim.observe()
    name = start.instruction.replace(" ", "_")
    path = tmp_path / f"KITCHEN_SCENE1_{name}_demo.hdf5"
    raw_data.libero(path, [actions], seen=[{key: rows[:-1] for key, rows in recorded.items()}])
    convert(raw.Libero(path, keep_noops=True), tmp_path / "out", 1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.convention == sim.convention
    assert dataset.instructions(np.array([0])) == [start.instruction]
    np.testing.assert_allclose(dataset.states[0], start.state, atol=1e-6)
    film = dataset.images(np.array([0]), "main")[0].astype(int)
    assert np.abs(film - start.images["main"]).mean() < 5, "as the simulator shows it, but for the film's losses"
    assert np.abs(film[:, ::-1] - start.images["main"]).mean() > 10, "and not mirrored"

    outcome = sim.execute(dataset.actions)
    end = sim.observe()
    sim.close()
    assert outcome.steps == len(actions)
    last = {key: rows[-1] for key, rows in recorded.items()}
    state = np.concatenate([last["ee_pos"], last["ee_ori"], last["gripper_states"]])
    np.testing.assert_allclose(end.state, state, atol=1e-5)
    assert np.linalg.norm(end.state[:3] - start.state[:3]) > 0.05, "it went somewhere"
    assert np.abs(last["agentview_rgb"][::-1, ::-1].astype(int) - end.images["main"]).mean() < 0.01


@pytest.mark.sim
@simulated
def test_holding_still_fails_in_libero_10(tmp_path):
    named = protocol("libero_10/v1+execute=8")
    short = type(named)(**{**named.to_dict(), "name": "libero_10/short/v1", "max_steps": 16})
    with Store(tmp_path / "results.sqlite") as store:
        results = evaluate(Hold(), short, 2, store, "hold", image_size=224, workers=2, progress=False)
    assert [(r.success, r.steps, r.credits["task"]) for r in results] == [(False, 16, 0), (False, 16, 1)]
    assert all(r.credits["goals_met"] < r.credits["goals"] for r in results)
    assert results[0].versions["mujoco"] == "3.8.1"
