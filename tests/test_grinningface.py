"""GrinningFace: physics, judgement, pictures, protocols."""

import numpy as np
import pytest

from vlm4vla.errors import UserError
from vlm4vla.sims import check, make, protocols
from vlm4vla.sims.grinningface import emoji, episode
from vlm4vla.sims.grinningface.env import CONVENTION, PLACED_RADIUS, STATIC_JOINT_SPEED, GrinningFace
from vlm4vla.sims.grinningface.episode import draw_episode
from vlm4vla.sims.grinningface.expert import next_action
from vlm4vla.sims.grinningface.model import CARD_HALF, CARD_PIXELS
from vlm4vla.sims.grinningface.render import choose_backend
from vlm4vla.sims.grinningface.stage import Stage

pytestmark = pytest.mark.sim
COMBINATIONS = [
    (level, split, variant)
    for level in episode.LEVELS
    for variant in episode.VARIANTS
    for split in (("hard",) if variant == "lookalike" else ("train", "val"))
]
OPEN, CLOSED = np.array([[0, 0, 0, 0, 0, 0, 1.0]]), np.zeros((1, 7))


@pytest.fixture(scope="module")
def place():
    env = GrinningFace("place", "train")
    yield env
    env.close()


@pytest.fixture(scope="module")
def pick():
    env = GrinningFace("pick_place", "train")
    yield env
    env.close()


def run_expert(env, seed, noise=0.0):
    env.reset(seed)
    rng = np.random.default_rng(seed)
    while True:
        action = env.expert()
        if noise and rng.random() < 0.4:
            action[:3] += rng.normal(0, noise, 3)
        outcome = env.execute(action[None])
        if outcome.done:
            return outcome


class TowardsCard:
    """The expert's view of an environment with another target."""

    def __init__(self, env, target):
        self._env, self.target = env, target

    def __getattr__(self, name):
        return getattr(self._env, name)


# Protocol. ------------------------------------------------------------------------------------------------------------


def test_keeps_the_simulator_protocol():
    check.check_sim(lambda: GrinningFace("pick_place", "hard", "lookalike", image_size=48))


def test_check_sim_notices_broken_adapters():
    class Forgetful(GrinningFace):
        def reset(self, seed):
            super().reset(seed + (self.steps > 0))

    class Lenient(GrinningFace):
        def execute(self, actions):
            return super().execute(np.nan_to_num(np.atleast_2d(actions)))

    class OneChannel(GrinningFace):
        def observe(self):
            seen = super().observe()
            seen.images["main"] = seen.images["main"][:, :, :1]
            return seen

    for broken, message in (
        (Forgetful, "run twice"),
        (Lenient, "without the chunk's dimension|a NaN"),
        (OneChannel, "expected uint8"),
    ):
        with pytest.raises(check.SimCheckError, match=message):
            check.check_sim(lambda cls=broken: cls("place", "train", image_size=32))


def test_names_are_checked_with_what_exists():
    with pytest.raises(UserError, match="pick_place"):
        GrinningFace("pick", "train")
    with pytest.raises(UserError, match="look-alike"):
        GrinningFace("place", "train", "lookalike")
    with pytest.raises(UserError, match="32 to 224"):
        make("grinningface", image_size=16)
    with pytest.raises(UserError, match="grinningface"):
        make("grinning_face")


def test_nothing_runs_before_reset_or_after_the_end(place):
    env = GrinningFace("place", "train", max_steps=1)
    for call in (env.observe, lambda: env.execute(OPEN)):
        with pytest.raises(RuntimeError, match="reset first"):
            call()
    env.reset(0)
    assert env.execute(np.repeat(CLOSED, 5, axis=0)).steps == 1
    with pytest.raises(RuntimeError, match="reset first"):
        env.execute(OPEN)


# Episodes. ------------------------------------------------------------------------------------------------------------


def test_one_seed_is_one_layout_in_every_split():
    for seed in range(20):
        a, b = (draw_episode(seed, "pick_place", split, "base") for split in ("train", "val"))
        assert np.array_equal(a.cards, b.cards)
        assert np.array_equal(a.cube, b.cube)
        assert a.target == b.target
        assert not set(a.emojis) & set(b.emojis)


@pytest.mark.parametrize(("level", "split", "variant"), COMBINATIONS)
def test_layouts_leave_room(level, split, variant):
    """No start counts as placed, no cards overlap, and the target is drawn evenly."""
    targets = []
    for seed in range(300):
        each = draw_episode(seed, level, split, variant)
        for start in (each.cube, each.start[:2]):
            assert np.linalg.norm(each.cards - start, axis=1).min() > PLACED_RADIUS
        gaps = np.abs(each.cards[:, None] - each.cards[None]).max(-1)
        assert gaps[~np.eye(len(gaps), dtype=bool)].min() > 2 * CARD_HALF
        assert len(set(each.emojis)) == len(each.cards) == (5 if variant == "cards5" else 3)
        assert each.emojis[each.target].name in each.instruction
        targets.append(each.target)
    share = np.bincount(targets) / len(targets)
    assert np.abs(share - 1 / len(share)).max() < 0.1


def test_unseen_colours_are_far_from_the_base_table():
    tables = np.array([draw_episode(seed, "place", "train", "colours").table for seed in range(300)])
    assert np.abs(tables - draw_episode(0, "place", "train", "base").table).max(axis=1).min() > 0.08
    assert tables.std(axis=0).min() > 0.05


def test_variants_change_what_they_name_and_nothing_else():
    for seed in range(30):
        base = draw_episode(seed, "place", "hard", "base")
        look = draw_episode(seed, "place", "hard", "lookalike")
        colours = draw_episode(seed, "place", "hard", "colours")
        words = draw_episode(seed, "place", "hard", "paraphrase")
        assert len({e.group for e in look.emojis}) == 1
        assert look.emojis[look.target] == base.emojis[base.target]
        assert colours.table != base.table
        assert colours.wall != base.wall
        assert colours.instruction == base.instruction
        assert words.instruction != base.instruction
        assert words.emojis == base.emojis
        layout = draw_episode(seed, "place", "hard", "layout")
        assert np.abs(layout.cards - base.cards).max() > episode.CARD_JITTER


# Physics. -------------------------------------------------------------------------------------------------------------


def test_actions_move_the_commanded_pose_in_the_base_frame(pick):
    pick.reset(1)
    before, state = pick.ee_position, pick.observe().state
    pick.execute(np.array([[0.03, 0, 0, 0, 0, 0, 1], [0, -0.02, 0, 0, 0, 0, 1], [0, 0, 0.01, 0, 0, 0, 1.0]]))
    assert pick.ee_position - before == pytest.approx([0.03, -0.02, 0.01], abs=0.002)
    pick.execute(np.array([[0, 0, 0, 0, 0, 0.2, 1], [0, 0, 0, 0, 0, 0.1, 1.0]]))
    assert pick.ee_position - before == pytest.approx([0.03, -0.02, 0.01], abs=0.003)
    forward = pick.scene.ee_rotation[:, 1]  # the fingers' axis; y without yaw
    assert np.arctan2(-forward[0], forward[1]) == pytest.approx(0.3, abs=0.02)
    assert state.shape == (7,)
    assert pick.limited_steps == 0


def test_limits_are_counted_and_hold(pick):
    pick.reset(1)
    before = pick.ee_position
    outcome = pick.execute(np.array([[0.2, 0, 0, 0, 0, 0, 1]]))
    assert outcome.credits["limited_steps"] == 1
    assert pick.ee_position[0] - before[0] == pytest.approx(0.05, abs=0.003)
    outcome = pick.execute(np.tile([0.05, 0.05, -0.05, 0.2, 0, 0, 1.0], (12, 1)))
    assert outcome.credits["limited_steps"] > 5
    assert np.isfinite(pick.scene.data.qpos).all()
    assert pick.ee_position[2] > 0


def test_the_cube_is_held_by_friction(place):
    place.reset(5)
    assert place.grasped
    start = place.cube_position
    assert start[2] > 0.1
    place.execute(np.tile([0.03, 0.02, 0.02, 0, 0, 0.1, 0], (3, 1)))
    assert place.grasped
    assert place.cube_position - start == pytest.approx([0.09, 0.06, 0.06], abs=0.01)
    place.execute(OPEN)
    assert not place.grasped
    assert place.cube_position[2] < start[2]


@pytest.mark.parametrize(("level", "split", "variant"), COMBINATIONS)
def test_the_expert_succeeds_despite_disturbances(level, split, variant):
    env = GrinningFace(level, split, variant)
    outcomes = [run_expert(env, seed, noise=0.02) for seed in range(8)]
    assert all(o.success for o in outcomes)
    env.close()


# Judgement. -----------------------------------------------------------------------------------------------------------


def test_success_on_the_target(pick):
    outcome = run_expert(pick, 7)
    assert outcome.success
    assert outcome.credits["execution"] is True
    assert outcome.credits["recognition"] is True
    assert outcome.credits["nearest"] == pick.target
    assert np.linalg.norm(pick.cube_position[:2] - pick.card_positions[pick.target]) < PLACED_RADIUS


def test_another_card_is_execution_without_recognition(pick):
    pick.reset(7)
    wrong = (pick.target + 1) % 3
    done = False
    while not done:
        outcome = pick.execute(next_action(TowardsCard(pick, wrong))[None])
        done = outcome.done
    assert not outcome.success
    assert pick.steps < pick.max_steps
    assert outcome.credits["execution"] is True
    assert outcome.credits["recognition"] is False
    assert outcome.credits["nearest"] == wrong


def test_off_the_cards_is_neither(place):
    place.reset(2)
    outcome = place.execute(np.repeat(OPEN, 4, axis=0))
    assert place.resting
    assert not outcome.done
    assert outcome.credits["execution"] is False
    assert outcome.credits["recognition"] is None
    assert outcome.credits["nearest"] is None


def test_held_over_a_card_is_recognition_without_execution(place):
    place.reset(2)
    outcome = None
    for _ in range(12):
        action = place.expert()
        action[6] = 0
        outcome = place.execute(action[None])
    assert outcome is not None
    assert not outcome.done
    assert place.grasped
    assert outcome.credits["execution"] is False
    assert outcome.credits["recognition"] is True


# Pictures. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96, 224])
def test_pictures_are_of_the_size_asked_for(size):
    env = GrinningFace("place", "train", image_size=size)
    env.reset(0)
    image = env.observe().images["main"]
    assert image.shape == (size, size, 3)
    assert image.std() > 20
    env.close()


def test_cards_are_legible_upright_and_where_pixel_says():
    """Of the card's eight turns and mirrors, the upright one is most like the picture, on each card."""
    stage = Stage(224, seed=0)
    emojis = [emoji.by_name(n) for n in ("rooster", "tractor", "rose") if n in {e.name for e in emoji.catalogue()}]
    emojis = (emojis + list(emoji.split("val")))[:3]
    scene = stage.row(emojis, cube="absent")
    assert (np.diff(scene.card_uv[:, 0]) > 0).all()
    for each, centre, extent in zip(emojis, scene.card_uv, scene.card_size, strict=True):
        assert extent[0] * 96 >= 17
        (left, top), (right, bottom) = ((centre + sign * extent / 2) * 224 for sign in (-1, 1))
        crop = scene.image[round(top) : round(bottom), round(left) : round(right)].astype(float)
        rows = np.linspace(0, CARD_PIXELS - 1, crop.shape[0]).round().astype(int)
        columns = np.linspace(0, CARD_PIXELS - 1, crop.shape[1]).round().astype(int)
        card = emoji.picture(each.codepoint, CARD_PIXELS).astype(float)
        turns = [np.rot90(m, k) for m in (card, card[:, ::-1]) for k in range(4)]
        likeness = [np.corrcoef(t[np.ix_(rows, columns)].ravel(), crop.ravel())[0, 1] for t in turns]
        assert int(np.argmax(likeness)) == 0, each.name
        assert likeness[0] > 0.6, each.name
    stage.close()


def test_the_cube_is_blue_where_pixel_says(pick):
    pick.reset(3)
    u, v = pick.pixel(pick.cube_position)
    red, _, blue = pick.observe().images["main"][int(v * 96), int(u * 96)].astype(int)
    assert blue > red + 40


def test_staged_scenes_repeat_and_tell_the_truth():
    names = emoji.split("train")[:9]
    a, b = Stage(48, seed=1), Stage(48, seed=1)
    for cube in ("hand", "table", "absent"):
        x, y = (s.scatter(names, random_colours=True, cube=cube) for s in (a, b))
        assert np.array_equal(x.image, y.image)
        assert np.array_equal(x.card_uv, y.card_uv)
        assert x.names == tuple(e.name for e in names)
        assert len(x.card_visible) == 9
        assert (x.cube_uv is None) == (cube == "absent")
        if x.cube_uv is not None and cube == "hand":
            assert np.abs(x.cube_uv - x.gripper_uv).max() < 0.02
    hidden = [s.card_visible.min() for s in (a.scatter(names) for _ in range(20))]
    assert min(hidden) < 0.9  # the arm stands before a card now and then
    with pytest.raises(ValueError, match="expected 3"):
        a.row(names)
    a.close()
    b.close()


def test_the_backend_is_the_one_asked_for(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert choose_backend() == "egl"
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match="unset MUJOCO_GL"):
        choose_backend()


def test_a_backend_that_does_not_load_names_its_package(monkeypatch):
    monkeypatch.setattr("vlm4vla.sims.grinningface.render.importlib.import_module", lambda name: object())
    env = GrinningFace("place", "train", image_size=32)
    env.reset(0)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(UserError, match="apt-get install libosmesa6"):
        env.observe()


def test_gymnasium_accepts_it():
    gymnasium = pytest.importorskip("gymnasium", reason='pip install "vlm4vla[grinningface]"')
    from gymnasium.utils.env_checker import check_env

    import vlm4vla.sims.grinningface.gym  # noqa: F401

    for name in ("Place", "PickPlace"):
        env = gymnasium.make(f"vlm4vla/GrinningFace{name}-v0", image_size=32, render_mode="rgb_array")
        check_env(env.unwrapped)
        env.close()


def test_the_demo_leaves_a_strip_and_a_film(tmp_path):
    av = pytest.importorskip("av", reason='pip install "vlm4vla[grinningface]"')
    from PIL import Image

    from vlm4vla.sims.grinningface.demo import demo

    strip, film = demo(tmp_path, "place", 1)
    assert Image.open(strip).width > 6 * 224
    with av.open(str(film)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) > 10
    assert frames[0].shape == (224, 224, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([strip.name, film.name])


# Evaluation protocols. ------------------------------------------------------------------------------------------------


def test_every_protocol_builds_and_says_its_rule():
    for name in protocols.protocol_names():
        if not name.startswith("grinningface/"):
            continue
        each = protocols.protocol(name)
        env = make(each.sim, **each.sim_args)
        assert isinstance(env, GrinningFace)
        assert env.max_steps == each.max_steps
        assert f"{PLACED_RADIUS:.3f}" in each.success_rule
        assert f"{STATIC_JOINT_SPEED}" in each.success_rule
    assert CONVENTION.control_hz == 5


def test_protocol_seeds_do_not_meet():
    v1, dev = (protocols.protocol(f"grinningface/place/val/{v}") for v in ("v1", "dev"))
    demonstrated = protocols.protocol("grinningface/place/id/v1")
    assert demonstrated.first_seed == protocols.DEMO_SEED
    assert demonstrated.sim_args == protocols.protocol("grinningface/place/train/v1").sim_args
    assert dev.first_seed - v1.first_seed >= 1_000_000
    assert v1.first_seed >= protocols.DEMO_SEED + 100 * 1_000_000


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(UserError, match="grinningface/place/val/v1"):
        protocols.protocol("grinningface/place/vall/v1")
