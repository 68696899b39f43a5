"""Converters: raw data in the layouts of their projects, made by ``raw_data.py``."""

import itertools
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import raw_data
from vlm4vla.arguments import run_spec
from vlm4vla.cli import cli
from vlm4vla.convention import BRIDGE, CALVIN, LIBERO
from vlm4vla.data import resumable
from vlm4vla.data.convert import base
from vlm4vla.data.convert.base import Demonstration, Left, convert
from vlm4vla.data.convert.calvin import ANNOTATIONS, Calvin
from vlm4vla.data.convert.libero import Libero, moves
from vlm4vla.data.convert.rlds import Gripper, Rlds, binary_gripper, change, load_mapping
from vlm4vla.data.convert.tfrecord import examples, masked_crc, parse
from vlm4vla.data.convert.unpickle import load_object_array
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.sims.libero import instruction as simulated_instruction

LOSS = 4
"""Mean absolute difference by the codec, of 255."""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Processes take seconds to start; the last test uses real ones."""

    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(resumable, "ProcessPoolExecutor", Pool)


def close(pictures, expected):
    return np.abs(pictures.astype(int) - np.stack(expected)).mean() < LOSS


def test_calvin(tmp_path):
    raw = raw_data.calvin(tmp_path / "raw")
    summary = convert(Calvin(tmp_path / "raw"), tmp_path / "out", 1, progress=False)
    assert (summary.episodes, summary.frames) == (3, 12)
    dataset = Dataset.open(tmp_path / "out")
    order = [*range(5), *range(3, 7), *range(9, 12)]
    assert dataset.episode_to.tolist() == [5, 9, 12]
    assert dataset.instructions(np.array([0, 5, 9])) == ["lift the red block", "open the drawer", "lift the red block"]
    assert dataset.convention == CALVIN
    assert dataset.fps == 30
    assert (dataset.actions[:, :6] == np.float32(raw[order, :6])).all()
    assert (dataset.actions[:, 6] == (raw[order, 6] == 1)).all()
    assert dataset.states[:, 3].tolist() == order
    for camera, size in (("main", 200), ("wrist", 84)):
        assert close(dataset.images(np.arange(12), camera), [raw_data.picture(i, size, size) for i in order])
    assert convert(Calvin(tmp_path / "raw"), tmp_path / "out", 1, progress=False) == summary


def test_libero(tmp_path):
    rng = np.random.default_rng(0)
    actions = [np.c_[rng.uniform(-1, 1, (t, 6)), np.repeat([-1, 1], [2, t - 2])] for t in (6, 5)]
    actions[0][3, :6] = 0  # nothing happens
    actions[1][2, :6] = 0  # the gripper closes
    raw_data.libero(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5", actions)
    summary = convert(Libero(tmp_path), tmp_path / "out", 1, progress=False)
    assert (summary.episodes, summary.frames, summary.left_out) == (2, 10, {"steps without motion": 1})
    assert "left out: 1 steps without motion" in str(summary)
    dataset = Dataset.open(tmp_path / "out")
    kept = np.concatenate([np.delete(actions[0], 3, 0), actions[1]])
    assert (dataset.actions[:, :6] == np.float32(kept[:, :6])).all()
    assert (dataset.actions[:, 6] == (kept[:, 6] == -1)).all()
    assert (dataset.convention, dataset.fps, dataset.tasks) == (LIBERO, 20, ("put the bowl on the plate",))
    frames = [0, 1, 2, 4, 5, *range(5)]
    assert dataset.states == pytest.approx(
        np.array(frames)[:, None] + np.concatenate([np.arange(n) / 10 for n in (3, 3, 2)])
    )
    for camera in ("main", "wrist"):
        assert close(dataset.images(np.arange(10), camera), [raw_data.picture(f, 128, 128) for f in frames])
    everything = convert(Libero(tmp_path, keep_noops=True), tmp_path / "all", 1, progress=False)
    assert (everything.frames, everything.left_out) == (11, {})


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "pick_up_the_black_bowl_next_to_the_ramekin_and_place_it_on_the_plate": (
            "pick up the black bowl next to the ramekin and place it on the plate"
        ),
        "pick_up_the_alphabet_soup_and_place_it_in_the_basket": "pick up the alphabet soup and place it in the basket",
        "turn_on_the_stove": "turn on the stove",
        "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it": ("turn on the stove and put the moka pot on it"),
        "LIVING_ROOM_SCENE1_pick_up_the_ketchup_and_put_it_in_the_basket": (
            "pick up the ketchup and put it in the basket"
        ),
    }.items(),
)
def test_libero_is_instructed_as_in_the_simulator(tmp_path, name, text):
    """A task of each suite."""
    raw_data.libero(tmp_path / f"{name}_demo.hdf5", [np.ones((2, 7))], size=16)
    source = Libero(tmp_path)
    (demonstration,) = source.demonstrations(source.shards()[0])
    assert demonstration.task == simulated_instruction(name) == text


def test_what_counts_as_no_motion():
    a = np.zeros((6, 7))
    a[:, 6] = [-1, -1, 1, 1, -1, -1]
    a[4, 0] = 1
    assert moves(a).tolist() == [False, False, False, False, True, False]
    a[0, 0] = 1
    assert moves(a).tolist() == [True, False, True, False, True, False]


def bridge(folder, lengths=(5, 2, 4), files=2):
    """Episodes over ``files`` files. Returns the raw (actions, states) in order."""
    rng, raw = np.random.default_rng(0), []
    folder.mkdir()
    for t in lengths:
        actions, states = rng.normal(size=(t, 7)), rng.normal(size=(t, 7))
        actions[:, 6] = rng.choice([0, 0.5, 1.0], t)
        raw.append((actions, states))
    records = [
        raw_data.example(raw_data.episode([raw_data.picture(f, 64, 64) for f in range(len(a))], a, s, f"task {i}"))
        for i, (a, s) in enumerate(raw)
    ]
    for i in range(files):
        raw_data.tfrecord(folder / f"bridge_orig-train.tfrecord-{i:05d}-of-{files:05d}", records[i::files])
    order = [raw[i] for first in range(files) for i in range(first, len(raw), files)]
    return order


def test_bridge_is_relabelled(tmp_path):
    raw = bridge(tmp_path / "raw", (5, 6, 4))
    source = Rlds(tmp_path / "raw", load_mapping("bridge"))
    summary = convert(source, tmp_path / "out", 1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.convention == BRIDGE
    assert summary.left_out == {"first and last steps, by the mapping": 6}
    assert dataset.episode_to.tolist() == np.cumsum([len(a) - 2 for a, _ in raw]).tolist()
    pose = np.concatenate([(s[2:, :6] - s[1:-1, :6] + np.pi) % (2 * np.pi) - np.pi for _, s in raw])
    pose[:, :3] = np.concatenate([s[2:, :3] - s[1:-1, :3] for _, s in raw])
    assert dataset.actions[:, :6] == pytest.approx(pose, abs=1e-6)
    assert (dataset.states == np.concatenate([np.float32(s[1:-1]) for _, s in raw])).all()
    assert set(dataset.actions[:, 6].tolist()) <= {0, 1}
    assert close(dataset.images(np.arange(3)), [raw_data.picture(f, 64, 64) for f in (1, 2, 3)])


def released_gripper(values):
    """OpenVLA's ``binarize_gripper_actions``, by its definition: what lies between becomes the next extreme."""
    result, carry = [], values[-1]
    for v in values[::-1]:
        carry = carry if 0.05 <= v <= 0.95 else float(v > 0.95)
        result.append(carry)
    return np.array(result[::-1])


@given(arrays(np.float64, st.integers(1, 20), elements=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.7, 0.99, 1.0])))
def test_the_gripper_is_binarised_as_in_the_release(values):
    ours = binary_gripper(values, Gripper(open=1, closed=0, between="next_extreme"))
    theirs = released_gripper(values)
    decided = np.isin(theirs, (0, 1))  # an end in between stays as it is there; here it is the nearer one
    assert (ours == theirs)[decided].all()
    assert np.isin(ours, (0, 1)).all()
    libero = binary_gripper(1 - 2 * values, Gripper(open=-1, closed=1))
    assert (libero == (values >= 0.5)).all()


def test_angles_change_the_short_way_round():
    poses = np.zeros((2, 6))
    poses[:, 5] = [3.1, -3.1]
    assert change(poses)[0, 5] == pytest.approx(2 * np.pi - 6.2)


def test_a_mapping_of_ones_own(tmp_path):
    raw = bridge(tmp_path / "raw", (5, 3))
    (tmp_path / "mine.yaml").write_text(
        "images: {main: steps/observation/image_0}\naction: steps/action\ninstruction: steps/language_instruction\n"
        "convention: {names: [x, y, z, roll, pitch, yaw, gripper], control: delta_ee, frame: tool, rotation: euler_xyz,"
        " position_unit: metre, gripper: '1=open,0=closed', control_hz: 10.0, camera: upright}\n"
        "gripper: {open: 0.0, closed: 1.0}\n"
    )
    convert(Rlds(tmp_path / "raw", load_mapping(str(tmp_path / "mine.yaml"))), tmp_path / "out", 1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert (dataset.convention.frame, dataset.fps, dataset.recorded_states) == ("tool", 10, None)
    actions = np.concatenate([a for a, _ in raw])
    assert dataset.actions[:, :6] == pytest.approx(actions[:, :6])
    assert (dataset.actions[:, 6] == (actions[:, 6] <= 0.5)).all()
    with pytest.raises(UserError, match="bridge, libero"):
        load_mapping("bridges")
    mine = tmp_path / "mine.yaml"
    mine.write_text(mine.read_text().replace("main:", "front:"))
    with pytest.raises(UserError, match=r"cameras \['front'\]"):
        load_mapping(str(mine))
    mine.write_text(mine.read_text().replace("action:", "actions:"))
    with pytest.raises(UserError, match=r"actions: unknown key \(nearest: action"):
        load_mapping(str(mine))


def test_records_are_read_back_whatever_they_hold(tmp_path):
    features = {
        "text": [b"", b"\0\0", "größer".encode()],
        "floats": np.array([1.5, -0.0, np.inf], np.float32),
        "numbers": np.array([0, 1, -1, 2**62, -(2**63)], np.int64),
        "none": [],
    }
    raw_data.tfrecord(tmp_path / "a.tfrecord", [raw_data.example(features)] * 2)
    for read in examples(tmp_path / "a.tfrecord"):
        assert read["text"] == features["text"]
        assert read["none"] == []
        for name in ("floats", "numbers"):
            assert (read[name] == features[name]).all(), name
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    unpacked = raw_data.field(3, b"".join(raw_data.varint(1 << 3) + raw_data.varint(n) for n in (7, 300)))
    entry = raw_data.field(1, raw_data.field(1, raw_data.field(1, b"n") + raw_data.field(2, unpacked)))
    assert parse(entry)["n"].tolist() == [7, 300]


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_parser(content):
    with suppress(ValueError, IndexError, KeyError):
        parse(content)


def test_the_commands_convert_and_say_what_comes_next(tmp_path):
    raw_data.calvin(tmp_path / "calvin")
    raw_data.libero(tmp_path / "put_demo.hdf5", [np.c_[np.ones((3, 6)), [-1, 1, 1]]])
    bridge(tmp_path / "bridge")
    for command in (
        ["calvin", tmp_path / "calvin"],
        ["libero", tmp_path / "put_demo.hdf5", "--keep-noops"],
        ["rlds", tmp_path / "bridge", "--mapping", "bridge"],
    ):
        out = tmp_path / f"out-{command[0]}"
        done = CliRunner().invoke(cli, ["data", "convert", *map(str, command), "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert f"{out}: " in done.output
        assert f"next: vlm4vla data inspect {out}" in done.output
        told = CliRunner().invoke(cli, ["data", "inspect", str(out)])
        assert f"vlm4vla train --data {out}" in told.output, told.output


def test_the_documented_mapping_and_settings_are_valid(tmp_path):
    text = (Path(__file__).parents[1] / "docs/data.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    mapping = load_mapping(str(tmp_path / "mine.yaml"))
    assert mapping.meaning().control_hz == 10
    commands = re.findall(r"^vlm4vla train ((?:.*\\\n)*.*)", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
        run_spec(None, (f"data.folder={words[words.index('--data') + 1]}", *settings))


# -- Bad input ---------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def change_frame(folder, number, **changes):
    path = folder / f"episode_{number:07d}.npz"
    with np.load(path) as file:
        values = dict(file)
    np.savez(path, **{**values, **{name: change(values[name]) for name, change in changes.items()}})


def nan(values):
    return np.r_[values[:2], np.nan, values[3:]]


def grey(pictures):
    return pictures[..., 0]


def all_frames(folder, **changes):
    for number in range(5):
        change_frame(folder, number, **changes)


BROKEN_CALVIN = {
    "no annotations": (lambda f: (f / ANNOTATIONS).unlink(), "auto_lang_ann.npy"),
    "half the annotations": (lambda f: truncate(f / ANNOTATIONS), "auto_lang_ann.npy"),
    "a frame is missing": (lambda f: (f / "episode_0000004.npz").unlink(), "no .*episode_0000004.npz"),
    "half a frame": (lambda f: truncate(f / "episode_0000004.npz"), "episode_0000004.npz: damaged"),
    "NaN": (lambda f: change_frame(f, 1, rel_actions=nan), "frames 0 to 4: actions with 1 NaN"),
    "two sizes": (
        lambda f: change_frame(f, 1, rgb_static=lambda p: p[:100]),
        r"episode_0000001.npz: rgb_static of \(100, 200, 3\)",
    ),
    "floats as pictures": (
        lambda f: change_frame(f, 1, rgb_gripper=np.float32),
        "frames 0 to 4: pictures of wrist as float32",
    ),
    "grey": (lambda f: all_frames(f, rgb_static=grey), r"frames 0 to 4: pictures of main as uint8 \(5, 200, 200\)"),
    "six numbers": (lambda f: all_frames(f, rel_actions=lambda a: a[:6]), r"frames 0 to 4: rel_actions .* \(5, 6\)"),
    "text": (lambda f: all_frames(f, robot_obs=np.bytes_), "frames 0 to 4: states as"),
    "another state": (lambda f: all_frames(f, robot_obs=lambda s: s[:9]), r"0000005.npz: robot_obs of \(15,\)"),
}


@pytest.mark.parametrize("kind", BROKEN_CALVIN)
def test_broken_calvin_is_named(tmp_path, kind):
    raw_data.calvin(tmp_path / "raw")
    damage, message = BROKEN_CALVIN[kind]
    damage(tmp_path / "raw")
    with pytest.raises(UserError, match=message):
        convert(Calvin(tmp_path / "raw"), tmp_path / "out", 1, progress=False)
    assert not (tmp_path / "out").exists()
    if "annotations" not in kind:
        dropping = tmp_path / "dropping"
        summary = convert(Calvin(tmp_path / "raw"), dropping, 1, progress=False, drop_damaged=True)
        assert summary.episodes + len(summary.damaged) == 3
        assert all(line in str(summary) for line in summary.damaged)
        assert Dataset.open(dropping).info["vlm4vla"]["provenance"]["damaged"] == list(summary.damaged)


def test_a_folder_above_is_told_what_is_inside(tmp_path):
    raw_data.calvin(tmp_path / "task_D_D" / "training")
    with pytest.raises(UserError, match="name a folder inside: training"):
        Calvin(tmp_path / "task_D_D").shards()
    bridge(tmp_path / "1.0.0")
    with pytest.raises(UserError, match=r"name the folder that holds them: .*1\.0\.0"):
        Rlds(tmp_path, load_mapping("bridge")).shards()
    with pytest.raises(UserError, match=r"no \*\.hdf5"):
        Libero(tmp_path).shards()


@pytest.mark.parametrize(("damage", "message"), [(truncate, "ends within a record"), (flip, "check sum is wrong")])
def test_broken_records_are_named(tmp_path, damage, message):
    bridge(tmp_path / "raw", (5, 6, 4, 7))
    path = sorted((tmp_path / "raw").iterdir())[1]
    damage(path)
    source = Rlds(tmp_path / "raw", load_mapping("bridge"))
    with pytest.raises(UserError, match=f"{path.name}, record .*{message}"):
        convert(source, tmp_path / "out", 1, progress=False)
    assert (tmp_path / "out.partial/shards/000000").is_dir(), "what is converted is kept"
    summary = convert(source, tmp_path / "dropping", 1, progress=False, drop_damaged=True)
    assert len(summary.damaged) == 1


def test_a_wrong_mapping_names_the_nearest_feature(tmp_path):
    bridge(tmp_path / "raw")
    mapping = load_mapping("bridge").model_copy(update={"state": "steps/observation/states"})
    with pytest.raises(UserError, match="nearest: steps/observation/state"):
        convert(Rlds(tmp_path / "raw", mapping), tmp_path / "out", 1, progress=False)


def test_broken_hdf5_is_named(tmp_path):
    raw_data.libero(tmp_path / "a.hdf5", [np.ones((3, 7))])
    with pytest.raises(UserError, match=r"the name of .*a\.hdf5"):
        Libero(tmp_path).shards()
    (tmp_path / "a.hdf5").rename(tmp_path / "a_demo.hdf5")
    (tmp_path / "b_demo.hdf5").write_bytes((tmp_path / "a_demo.hdf5").read_bytes()[:900])
    with pytest.raises(UserError, match=r"b_demo\.hdf5: damaged or foreign"):
        Libero(tmp_path).shards()
    raw_data.libero(tmp_path / "b_demo.hdf5", [np.full((3, 7), 0.5)])
    with pytest.raises(UserError, match="other gripper actions than -1 and 1"):
        convert(Libero(tmp_path), tmp_path / "out", 1, progress=False)


def replace(group, name, values):
    del group[name]
    group[name] = values


BROKEN_LIBERO = {
    "other length": (
        lambda demo: replace(demo, "obs/ee_pos", np.zeros((6, 3))),
        r"\[3, 3, 3, 6, 3, 3\] steps",
    ),
    "six numbers": (lambda demo: replace(demo, "actions", np.ones((3, 6))), r"actions \(3, 6\)"),
    "other name": (lambda demo: demo.parent.move("demo_1", "extra"), "extra: .*demo_NUMBER"),
    "no group": (lambda demo: replace(demo.parent, "demo_1", np.zeros(3)), "demo_1: "),
    "text": (lambda demo: replace(demo, "actions", ["a"] * 3), "demo_1: "),
}


@pytest.mark.parametrize("kind", BROKEN_LIBERO)
def test_a_broken_demonstration_of_libero_is_named_and_can_be_dropped(tmp_path, kind):
    path = tmp_path / "a_demo.hdf5"
    raw_data.libero(path, [np.ones((3, 7))] * 3, size=16)
    damage, message = BROKEN_LIBERO[kind]
    with h5py.File(path, "a") as file:
        damage(file["data/demo_1"])
    with pytest.raises(UserError, match=rf"a_demo\.hdf5, .*{message}"):
        convert(Libero(tmp_path), tmp_path / "out", 1, progress=False)
    summary = convert(Libero(tmp_path), tmp_path / "out", 1, progress=False, drop_damaged=True)
    assert (summary.episodes, len(summary.damaged)) == (2, 1)


BROKEN_RLDS = {
    "no action": ({"steps/action": np.empty(0, np.float32)}, "0 numbers in 'steps/action' at 3 steps"),
    "an empty list": ({"steps/action": []}, "0 numbers in 'steps/action'"),
    "six numbers": ({"steps/action": np.zeros(18, np.float32)}, "6 numbers a step"),
    "two sizes": (
        {"steps/observation/image_0": [raw_data.jpeg(raw_data.picture(0, size, 16)) for size in (16, 16, 18)]},
        r"pictures of [\s\S]*one size",
    ),
    "no picture": ({"steps/observation/image_0": [b"\x89PNG\r\n\x1a\n" + b"\0" * 30] * 3}, "a damaged picture"),
}


@pytest.mark.parametrize("kind", BROKEN_RLDS)
def test_a_broken_record_of_rlds_is_named_and_can_be_dropped(tmp_path, kind):
    pictures = [raw_data.picture(i, 16, 16) for i in range(3)]
    good = raw_data.episode(pictures, np.ones((3, 7)), np.zeros((3, 7)), "put it down")
    changes, message = BROKEN_RLDS[kind]
    path = tmp_path / "bridge-train.tfrecord-00000-of-00001"
    raw_data.tfrecord(path, [raw_data.example(good), raw_data.example(good | changes)])
    source = Rlds(tmp_path, load_mapping("bridge").model_copy(update={"drop_first": False, "relabel": "none"}))
    with pytest.raises(UserError, match=rf"{path.name}, record 1: [\s\S]*{message}"):
        convert(source, tmp_path / "out", 1, progress=False)
    summary = convert(source, tmp_path / "out", 1, progress=False, drop_damaged=True)
    assert (summary.episodes, len(summary.damaged)) == (1, 1)


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_annotations_run_nothing(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)

    def save(value):
        with Path("a.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            pickle.dump(value, file, protocol=protocol)
        return Path("a.npy")

    good = {"a": [1, 2.5, "text", None, True, b"bytes"], "b": np.arange(6.0).reshape(2, 3), "c": np.float32(1.5)}
    read = load_object_array(save(np.array(good, object)))
    assert (read["a"], read["c"]) == (good["a"], 1.5)
    assert (read["b"] == good["b"]).all()
    for bad in (Evil(), np.array({"x": Evil()}, object), eval, open, np.array([lambda: 0].__class__), Path("x")):
        with pytest.raises(UserError, match="which is not read"):
            load_object_array(save(bad))
    assert not Path("EVIL").exists()


def check_unpickler(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(b"\x80\x04" + content + b".")
    with suppress(UserError):
        assert plain(load_object_array(path))


@given(st.binary(max_size=80))
def test_no_bytes_get_past_the_unpickler(tmp_path_factory, content):
    check_unpickler(tmp_path_factory, content)


def plain(value):
    """Whether Python's own values and arrays of numbers or text are all there is in it."""
    if isinstance(value, dict):
        return all(plain(key) and plain(each) for key, each in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    if type(value) is np.ndarray:
        return value.dtype.kind in "biufSU"
    return value is None or type(value) in (str, bytes, int, float, bool)


FRAGMENTS = [
    b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.multiarray\nscalar\n",
    b"c_codecs\nencode\n",
    *(b"\x8c" + bytes([len(text)]) + text for text in (b"O8", b"f8", b"U3", b"<", b"latin1")),
    *(bytes([code]) for code in b"])N}(\x88RbaesutN.2\x85\x86\x87\x94\x81Q0"),
    b"K\x03",
    b"C\x08abcdefgh",
    b"h\x00",
]
"""Instructions of pickles, and the names that are known."""


@settings(max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=16))
def test_no_instructions_get_past_the_unpickler(tmp_path_factory, fragments):
    check_unpickler(tmp_path_factory, b"".join(fragments))


@pytest.mark.parametrize(
    ("before", "after"), [(b"}", b"Ns"), (b"}(", b"Nu"), (b"(", b"Nd"), (b"\x8f(", b"\x90"), (b"(", b"\x91")]
)
def test_no_tuple_becomes_a_key(tmp_path, before, after):
    """Each instruction that hashes what it is given, with tuples of which each holds the one before twice."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(b"\x80\x04" + before + b")" + b"2\x86" * 60 + after + b".")
    with pytest.raises(UserError, match=r"a tuple as the key|a set"):
        load_object_array(path)


def test_what_a_pickle_refers_to_twice_is_made_once(tmp_path):
    value = [np.array([1.0], object)]
    for _ in range(60):
        value = [value, value]
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(value, file)
    read = load_object_array(path)
    for _ in range(60):
        assert read[0] is read[1]
        read = read[0]
    assert read == [[1.0]]


# -- Shards ------------------------------------------------------------------------------------------------------------


class Counting:
    """Three shards of two demonstrations; each made is a line in ``log``, ``pause`` seconds apart."""

    convention = BRIDGE

    def __init__(self, log, pause=0.0, size=16):
        self.log, self.pause, self.size = log, pause, size

    def identity(self):
        return {"source": "counting", "size": self.size}

    def shards(self):
        return [0, 1, 2]

    def demonstrations(self, shard):
        for i in range(2):
            time.sleep(self.pause)
            number = 2 * shard + i
            with open(self.log, "a") as file:
                file.write(f"{number}\n")
            images = np.stack([raw_data.picture(number + f, self.size, self.size) for f in range(3)])
            actions = np.zeros((3, 7))
            actions[:, 0] = number
            yield Demonstration(f"demonstration {number}", {"main": images}, actions, None, f"task {number % 2}")
        yield Left("nothing", 1)


def made(log):
    return [int(line) for line in log.read_text().split()]


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    source, out = Counting(tmp_path / "log"), tmp_path / "out"
    plain = source.demonstrations

    def interrupted(shard):
        if shard == 2:
            raise KeyboardInterrupt
        return plain(shard)

    monkeypatch.setattr(source, "demonstrations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, 1, progress=False)
    with pytest.raises(UserError, match="unfinished"):
        Dataset.open(out)
    with pytest.raises(UserError, match="the beginning of another conversion"):
        convert(Counting(tmp_path / "log", size=18), out, 1, progress=False)
    monkeypatch.delattr(source, "demonstrations")
    assert made(tmp_path / "log") == [0, 1, 2, 3]
    summary = convert(source, out, 1, progress=False)
    assert made(tmp_path / "log") == [0, 1, 2, 3, 4, 5]
    assert (summary.episodes, summary.left_out) == (6, {"nothing": 3})
    assert convert(source, out, 1, progress=False) == summary
    with pytest.raises(UserError, match="another data set"):
        convert(Counting(tmp_path / "log", size=18), out, 1, progress=False)


def test_dropping_what_is_damaged_goes_on_where_the_damage_stopped(tmp_path, monkeypatch):
    source, out = Counting(tmp_path / "log"), tmp_path / "out"
    plain = source.demonstrations

    def damaged(shard):
        first, *rest = plain(shard)
        yield UserError("one that is damaged", "a whole one", "mend it") if shard == 1 else first
        yield from rest

    monkeypatch.setattr(source, "demonstrations", damaged)
    with pytest.raises(UserError, match=r"one that is damaged[\s\S]*--drop-damaged"):
        convert(source, out, 1, progress=False)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial/shards").glob("0*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(base, "write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, out, 1, progress=False, drop_damaged=True)
    assert kept
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(UserError, match="all demonstrations"):
        convert(source, out, 1, progress=False)
    summary = convert(source, out, 1, progress=False, drop_damaged=True)
    assert (summary.episodes, summary.damaged) == (5, ("one that is damaged",))
    assert made(tmp_path / "log") == [*range(6), 2, 3]
    with pytest.raises(UserError, match="1 damaged demonstrations"):
        convert(source, out, 1, progress=False)


def test_pictures_that_no_film_takes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"demonstration \d: pictures of 15 x 15"):
        convert(Counting(tmp_path / "log", size=15), tmp_path / "out", 1, progress=False)


def test_a_data_set_that_no_demonstration_is_left_of_is_no_data_set(tmp_path, monkeypatch):
    source = Counting(tmp_path / "log")
    monkeypatch.setattr(source, "demonstrations", lambda shard: iter([Left("everything", 2)]))
    with pytest.raises(UserError, match="no episode to write"):
        convert(source, tmp_path / "out", 1, progress=False)


SLOW = """
import sys
from pathlib import Path
from test_convert import Counting
from vlm4vla.data.convert.base import convert
if __name__ == "__main__":
    print(convert(Counting(Path(sys.argv[1]), float(sys.argv[3])), Path(sys.argv[2]), 2, progress=False))
"""


def start(tmp_path, out, pause):
    (tmp_path / "slow.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    arguments = [str(tmp_path / "log"), str(out), str(pause)]
    return subprocess.Popen([sys.executable, str(tmp_path / "slow.py"), *arguments], env=env, stdout=subprocess.PIPE)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


def test_real_processes_and_kills_change_no_byte(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    process = start(tmp_path, out, 0.5)
    shards = tmp_path / "out.partial/shards"
    end = time.monotonic() + 60
    while not list(shards.glob("0*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    time.sleep(1.5)  # the orphans end
    finished = {int(p.name) for p in shards.glob("0*")}
    before = len(made(log))
    done = start(tmp_path, out, 0)
    assert b"6 episodes, 18 frames" in done.communicate()[0]
    again = made(log)[before:]
    assert {number // 2 for number in again} == {0, 1, 2} - finished
    assert not (tmp_path / "out.partial").exists()
    convert(Counting(log), tmp_path / "alone", 1, progress=False)
    assert files(out) == files(tmp_path / "alone")
    dataset = Dataset.open(out)
    assert dataset.actions[:, 0].tolist() == np.repeat(range(6), 3).tolist()
    assert dataset.info["vlm4vla"]["provenance"]["left_out"] == {"nothing": 3}


@pytest.mark.sim
def test_converted_actions_played_open_loop_reach_the_same_end(tmp_path):
    """The expert's episodes as RLDS, converted, replayed: every cube ends on its card, where it did before."""
    from vlm4vla.sims.grinningface.env import CONVENTION, GrinningFace

    sim, records, ends = GrinningFace(level="place", image_size=64), [], []
    for seed in range(3):
        sim.reset(seed)
        images, states, actions, done = [], [], [], False
        while not done:
            seen = sim.observe()
            assert seen.state is not None
            images.append(seen.images["main"])
            states.append(seen.state)
            actions.append(sim.expert())
            done = sim.execute(actions[-1][None]).done
        ends.append(sim.cube_position.copy())
        raw = np.array(actions)
        raw[:, 6] = 1 - 2 * raw[:, 6]  # another robot's gripper: -1 = open, 1 = closed
        records.append(raw_data.example(raw_data.episode(images, raw, states, seen.instruction)))
    (tmp_path / "raw").mkdir()
    raw_data.tfrecord(tmp_path / "raw/grinning-train.tfrecord-00000-of-00001", records)
    mapping = load_mapping("bridge").model_copy(
        update={"convention": CONVENTION.to_dict(), "drop_first": False, "relabel": "none"}
        | {"gripper": Gripper(open=-1, closed=1)}
    )
    convert(Rlds(tmp_path / "raw", mapping), tmp_path / "out", 1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    for seed, end in enumerate(ends):
        sim.reset(seed)
        outcome = sim.execute(dataset.actions[dataset.episode_from[seed] : dataset.episode_to[seed]])
        assert outcome.success
        assert sim.cube_position == pytest.approx(end, abs=1e-9)
        assert dataset.tasks[dataset.task_index[dataset.episode_from[seed]]] == sim.observe().instruction
    sim.close()
