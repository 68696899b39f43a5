"""LeRobotDataset v3 folders: round trip, damage, the frame cache, and lerobot's own reader on our files."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_sim import CONVENTION
from vlm4vla.data import write as writing
from vlm4vla.data.cache import frames
from vlm4vla.data.inspect import inspect
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.write import Episode, pixel_statistics, write
from vlm4vla.errors import UserError

DATA = Path("data/chunk-000/file-000.parquet")


def raw(lengths=(3, 1, 4), size=(6, 8), states=4, seed=0):
    """Per episode: pictures uint8 (T, h, w, 3), actions (T, 7), states (T, S) or None, task."""
    rng = np.random.default_rng(seed)
    tasks = ["put it left", "put it right"]
    return [
        (
            rng.integers(0, 256, (t, *size, 3), np.uint8),
            np.float32(rng.normal(size=(t, 7)) * [1, 1, 1, 0, 0, 0, 0] + [0, 0, 0, 0, 0, 0, 1]),
            rng.normal(size=(t, states)).astype(np.float32) if states else None,
            tasks[i % 2],
        )
        for i, t in enumerate(lengths)
    ]


def encoded(episodes):
    return [Episode.encode({"main": images}, actions, states, task) for images, actions, states, task in episodes]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "demos", encoded(raw()), CONVENTION, {"source": "a test"})
    return tmp_path / "demos"


def check_same(dataset, episodes):
    images = np.concatenate([e[0] for e in episodes])
    actions = np.concatenate([e[1] for e in episodes])
    lengths = [len(e[1]) for e in episodes]
    assert (dataset.num_episodes, dataset.num_frames) == (len(episodes), len(actions))
    assert dataset.episode_to.tolist() == np.cumsum(lengths).tolist()
    assert (dataset.episode_to - dataset.episode_from).tolist() == lengths
    assert dataset.actions.dtype == np.float32
    assert (dataset.actions == actions).all()
    everything = np.arange(len(actions))
    assert dataset.instructions(everything) == [e[3] for e in episodes for _ in range(len(e[1]))]
    shuffled = np.random.default_rng(0).permutation(everything)
    assert (dataset.images(shuffled) == images[shuffled]).all()
    assert (np.concatenate(list(dataset.batches())) == images).all()
    if episodes[0][2] is not None:
        assert (dataset.states == np.concatenate([e[2] for e in episodes])).all()


def test_what_is_written_is_read_back(folder):
    dataset = Dataset.open(folder)
    check_same(dataset, raw())
    assert dataset.convention == CONVENTION
    assert dataset.fps == 5
    assert dataset.tasks == ("put it left", "put it right")
    assert dataset.cameras == {"main": (6, 8)}
    assert not folder.with_name("demos.partial").exists()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 2),
)
def test_round_trip_of_any_shape(tmp_path_factory, lengths, size, states):
    folder = tmp_path_factory.mktemp("any") / "demos"
    episodes = raw(lengths, size, states)
    write(folder, encoded(episodes), CONVENTION, {})
    check_same(Dataset.open(folder), episodes)


def test_many_files_read_like_one(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "DATA_FILE_MB", 0)
    monkeypatch.setattr(writing, "CHUNK_FILES", 2)
    monkeypatch.setattr(writing, "EPISODE_ROWS", 2)
    episodes = raw((3, 1, 4, 2, 5))
    write(tmp_path / "many", encoded(episodes), CONVENTION, {})
    dataset = Dataset.open(tmp_path / "many")
    assert [f"{p.parent.name}/{p.name}" for p in dataset.files] == [
        f"chunk-00{i // 2}/file-00{i % 2}.parquet" for i in range(5)
    ]
    check_same(dataset, episodes)
    rows = pq.read_table(tmp_path / "many" / "meta/episodes" / "chunk-000/file-000.parquet").to_pylist()
    assert [(r["data/chunk_index"], r["data/file_index"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_statistics_agree_with_the_pixels_and_actions(folder):
    stats = json.loads((folder / "meta/stats.json").read_text())
    images = np.concatenate([e[0] for e in raw()]) / 255
    actions = np.concatenate([e[1] for e in raw()]).astype(float)
    picture = stats["observation.images.main"]
    for name, of in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        assert np.array(picture[name]).ravel() == pytest.approx(of(images, axis=(0, 1, 2))), name
        assert stats["action"][name] == pytest.approx(of(actions, axis=0)), name
    assert stats["action"]["q01"] == pytest.approx(np.quantile(actions, 0.01, axis=0))
    assert np.array(picture["mean"]).shape == (3, 1, 1)
    assert stats["index"]["max"] == [7]


def test_histogram_quantiles_are_those_of_the_pixels():
    pixels = np.random.default_rng(0).integers(10, 200, 999)
    counts = np.stack([np.bincount(pixels, minlength=256)] * 3)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        exact = np.quantile(pixels, q, method="inverted_cdf") / 255
        assert pixel_statistics(counts, 1)[name] == pytest.approx(np.full((3, 1, 1), exact))


def test_the_content_hash_is_of_the_content(tmp_path, folder):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    first = Dataset.open(folder).content_hash
    assert Dataset.open(moved).content_hash == first
    hashes = {first}
    for name, change in {
        "pixel": lambda e: [(e[0][0] ^ 1, *e[0][1:]), *e[1:]],
        "action": lambda e: [(e[0][0], e[0][1] + 1, *e[0][2:]), *e[1:]],
        "task": lambda e: [(*e[0][:3], "put it away"), *e[1:]],
    }.items():
        write(tmp_path / name, encoded(change(raw())), CONVENTION, {})
        hashes.add(Dataset.open(tmp_path / name).content_hash)
    write(tmp_path / "convention", encoded(raw()), replace(CONVENTION, frame="tool"), {})
    hashes.add(Dataset.open(tmp_path / "convention").content_hash)
    assert len(hashes) == 5


def test_a_data_set_appears_only_when_complete(tmp_path):
    def interrupted():
        yield encoded(raw())[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "demos", interrupted(), CONVENTION, {})
    assert not (tmp_path / "demos").exists()
    with pytest.raises(UserError, match="unfinished"):
        Dataset.open(tmp_path / "demos")
    write(tmp_path / "demos", encoded(raw()), CONVENTION, {})
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "demos", encoded(raw()), CONVENTION, {})


@pytest.mark.parametrize(
    "other", [raw((2,), size=(6, 6)), raw((2,), states=3), raw((2,), states=0)], ids=["size", "state", "no state"]
)
def test_episodes_must_have_the_same_features(tmp_path, other):
    with pytest.raises(UserError, match="episode 3 with"):
        write(tmp_path / "demos", encoded(raw() + other), CONVENTION, {})
    with pytest.raises(UserError, match="no episode"):
        write(tmp_path / "none", [], CONVENTION, {})


def info(folder, **changes):
    path = folder / "meta/info.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


EPISODES = Path("meta/episodes/chunk-000/file-000.parquet")
DAMAGE = {
    "nothing": (lambda f: shutil.rmtree(f), "info.json"),
    "no info": (lambda f: (f / "meta/info.json").unlink(), "info.json"),
    "half an info": (lambda f: truncate(f / "meta/info.json"), "info.json"),
    "foreign json": (lambda f: (f / "meta/info.json").write_text("[1]"), "codebase_version None"),
    "old version": (lambda f: info(f, codebase_version="v1.6"), "codebase_version 'v1.6'"),
    "no fps": (lambda f: info(f, fps=None), "info.json: no fps"),
    "no action": (lambda f: info(f, features={}), "info.json: no features.action"),
    "fps 0": (lambda f: info(f, fps=0), "info.json: fps 0"),
    "text as fps": (lambda f: info(f, fps="5"), "info.json: fps '5'"),
    "no shape": (lambda f: info(f, features={"action": {}}), "info.json: features.action of shape None"),
    "flat pictures": (
        lambda f: info(f, features={"action": {"shape": [7]}, "v": {"dtype": "image", "shape": [9, 9]}}),
        r"info.json: features.v of shape \[9, 9\]",
    ),
    "a list of features": (lambda f: info(f, features=["action"]), "info.json: features: "),
    "text as a feature": (lambda f: info(f, features={"action": "x"}), "info.json: features.action: 'x'"),
    "foreign entry": (lambda f: info(f, vlm4vla=[1]), r"info.json: vlm4vla: \[1\]"),
    "foreign convention": (lambda f: info(f, vlm4vla={"convention": "x"}), "info.json: vlm4vla: "),
    "foreign camera": (lambda f: info(f, vlm4vla={"cameras": {"main": "x"}}), r"cameras of the features \['x'\]"),
    "foreign description": (lambda f: (f / "meta/vlm4vla.json").write_text("[1]"), r"vlm4vla.json: \[1\]"),
    "no film": (
        lambda f: info(f, features={"action": {"shape": [7]}, "v": {"dtype": "video", "shape": [9, 9, 3]}}),
        "episodes.*columns.*videos/v/from_timestamp",
    ),
    "no tasks": (lambda f: (f / "meta/tasks.parquet").unlink(), "tasks.parquet: no such file"),
    "no episodes": (lambda f: (f / EPISODES).unlink(), "episodes: no Parquet file"),
    "half a data file": (lambda f: truncate(f / DATA), "file-000.parquet: damaged"),
    "empty data file": (lambda f: os.truncate(f / DATA, 0), "file-000.parquet: damaged"),
    "no data file": (lambda f: (f / DATA).unlink(), "0 frames in 0 files.*8 as in"),
    "foreign data file": (lambda f: rewrite(f / DATA, lambda t: t.drop("action")), "file-000.parquet: .*columns"),
    "frames missing": (lambda f: rewrite(f / DATA, lambda t: t.slice(1)), "7 frames.*8 as in"),
    "frames swapped": (lambda f: rewrite(f / DATA, lambda t: t.take([1, 0, *range(2, 8)])), "frames of other"),
    "gap": (lambda f: rewrite(f / EPISODES, lambda t: t.take([0, 2])), "gaps or overlaps"),
    "tasks missing": (lambda f: rewrite(f / "meta/tasks.parquet", lambda t: t.slice(0, 1)), "task 1.*one of the 1"),
    "action size": (lambda f: info(f, features={"action": {"shape": [6]}}), "action with 7 numbers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){message}") as error:
        Dataset.open(folder)
    assert str(folder) in error.value.found


def test_a_damaged_picture_is_named(folder):
    def blank(table):
        column = table["observation.images.main"].combine_chunks()
        files = [None if i == 5 else file for i, file in enumerate(column.field("bytes").to_pylist())]
        struct = pa.StructArray.from_arrays([pa.array(files, pa.binary()), column.field("path")], ["bytes", "path"])
        return table.set_column(table.column_names.index("observation.images.main"), "observation.images.main", struct)

    rewrite(folder / DATA, blank)
    dataset = Dataset.open(folder)
    dataset.images(np.array([4, 6]))
    with pytest.raises(UserError, match="frame 5"):
        dataset.images(np.array([5]))
    with pytest.raises(UserError, match="frame 5"):
        frames(dataset)
    assert not list((folder / ".cache").iterdir())


def test_what_is_not_recorded_is_not_made_up(tmp_path, folder):
    write(tmp_path / "stateless", encoded(raw(states=0)), CONVENTION, {})
    with pytest.raises(UserError, match=r"without observation\.state"):
        _ = Dataset.open(tmp_path / "stateless").states
    dataset = Dataset.open(folder)
    with pytest.raises(UserError, match=r"cameras \['main'\]"):
        dataset.images(np.array([0]), "wrist")
    with pytest.raises(UserError, match="6 x 8"):
        _ = dataset.image_size
    with pytest.raises(IndexError, match="of 8 frames"):
        dataset.images(np.array([8]))
    info(folder, vlm4vla=None)
    with pytest.raises(UserError, match="convention"):
        _ = Dataset.open(folder).convention
    assert "none: training will refuse" in str(inspect(folder))
    assert "data describe" in str(inspect(folder).next_step)


def test_the_cache_holds_the_pictures_and_is_built_once(folder):
    dataset = Dataset.open(folder)
    first = frames(dataset)
    assert (first == dataset.images(np.arange(8))).all()
    assert not first.flags.writeable
    (path,) = (folder / ".cache").iterdir()
    built = path.stat().st_mtime_ns
    frames(Dataset.open(folder))
    assert path.stat().st_mtime_ns == built


def test_a_stale_or_damaged_cache_is_rebuilt(folder):
    frames(Dataset.open(folder))
    (path,) = (folder / ".cache").iterdir()
    truncate(path)
    assert (frames(Dataset.open(folder)) == Dataset.open(folder).images(np.arange(8))).all()
    path.write_bytes(b"no array")
    assert (frames(Dataset.open(folder)) == Dataset.open(folder).images(np.arange(8))).all()
    shutil.rmtree(folder / "data")
    write(folder.with_name("other"), encoded(raw(seed=1)), CONVENTION, {})
    shutil.move(folder.with_name("other") / "data", folder / "data")
    assert (frames(Dataset.open(folder)) == np.concatenate([e[0] for e in raw(seed=1)])).all()
    assert len(list((folder / ".cache").iterdir())) == 1


def test_a_cache_that_finds_no_room_says_so(folder):
    """A file-size limit stands for the full disk; a sparse memory map would pass it by, or die of SIGBUS."""
    code = """if True:
        import resource, signal, sys
        from vlm4vla.data.cache import frames
        from vlm4vla.data.lerobot import Dataset
        from vlm4vla.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        dataset = Dataset.open(sys.argv[1])
        size = dataset.num_frames * 3 * dataset.camera_size("main")[0] * dataset.camera_size("main")[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        try:
            frames(dataset)
        except UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert not list((folder / ".cache").iterdir())


def test_a_large_folder_opens_without_a_call_or_an_object_for_each_frame(tmp_path):
    episode = encoded(raw((1000,), size=(1, 1)))[0]
    write(tmp_path / "large", (episode for _ in range(200)), CONVENTION, {})
    calls, objects = 0, sys.getallocatedblocks()

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        opened = Dataset.open(tmp_path / "large")
    finally:
        sys.setprofile(None)
    assert opened.num_frames == 200_000
    assert calls < 100_000
    assert sys.getallocatedblocks() - objects < 100_000


LEROBOT = os.environ.get("LEROBOT_PYTHON", sys.executable)
READ_WITH_LEROBOT = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
d = LeRobotDataset("local/demos", root=sys.argv[1], delta_timestamps={"action": [0, 0.2]})
items = [d[i] for i in range(len(d))]
print(json.dumps({
    "frames": d.num_frames, "episodes": d.num_episodes, "fps": d.fps,
    "action": [i["action"].tolist() for i in items], "state": [i["observation.state"].tolist() for i in items],
    "image": [(i["observation.images.main"] * 255).round().int().permute(1, 2, 0).tolist() for i in items],
    "task": [i["task"] for i in items], "pad": [i["action_is_pad"].tolist() for i in items],
    "mean": d.meta.stats["action"]["mean"].tolist(), "ends": d.meta.episodes["dataset_to_index"][:],
}))
"""


WRITE_WITH_LEROBOT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
features = {
    "observation.images.main": {"dtype": "image", "shape": (6, 8, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["a", "b", "c", "d"]},
    "action": {"dtype": "float32", "shape": (7,), "names": None},
}
d = LeRobotDataset.create("local/demos", 5, features, root=sys.argv[1], use_videos=False)
raw = np.load(sys.argv[2])
for episode in range(3):
    for image, action, state in zip(*(raw[f"{name}{episode}"] for name in ("image", "action", "state"))):
        frame = {"observation.images.main": image, "action": action, "observation.state": state}
        d.add_frame(frame | {"task": ["put it left", "put it right"][episode % 2]})
    d.save_episode()
d.finalize()
"""


def run_lerobot(tmp_path, code, *arguments):
    """Run a script in lerobot's environment, offline; its last line of output."""
    if subprocess.run([LEROBOT, "-c", "import lerobot.datasets.lerobot_dataset"], capture_output=True).returncode:
        pytest.skip("needs lerobot: set LEROBOT_PYTHON to the interpreter of an environment with `pip install lerobot`")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([LEROBOT, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1:]


@pytest.mark.compat
def test_lerobot_reads_our_folders(folder):
    read = json.loads(run_lerobot(folder.parent, READ_WITH_LEROBOT, folder)[0])
    ours = Dataset.open(folder)
    assert (read["frames"], read["episodes"], read["fps"]) == (8, 3, 5)
    assert (np.float32(read["action"])[:, 0] == ours.actions).all()
    assert (np.float32(read["state"]) == ours.states).all()
    assert (np.array(read["image"]) == ours.images(np.arange(8))).all()
    assert read["task"] == ours.instructions(np.arange(8))
    assert read["pad"] == [[False, i in (2, 3, 7)] for i in range(8)]
    assert read["mean"] == pytest.approx(ours.actions.mean(0))
    assert read["ends"] == ours.episode_to.tolist()


@pytest.mark.compat
def test_we_read_folders_that_lerobot_wrote(tmp_path):
    episodes = raw()
    named = {f"{name}{i}": e[k] for i, e in enumerate(episodes) for k, name in enumerate(("image", "action", "state"))}
    np.savez(tmp_path / "raw.npz", **named)
    run_lerobot(tmp_path, WRITE_WITH_LEROBOT, tmp_path / "demos", tmp_path / "raw.npz")
    dataset = Dataset.open(tmp_path / "demos")
    check_same(dataset, episodes)
    assert dataset.fps == 5
    with pytest.raises(UserError, match="convention"):
        _ = dataset.convention
