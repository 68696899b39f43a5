"""Pictures in MP4 files: round trip, random access, several files and cameras, damage; versions 2.0 and 2.1."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_sim import CONVENTION
from test_lerobot import run_lerobot
from vlm4vla.data import video
from vlm4vla.data import write as writing
from vlm4vla.data.cache import frames
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError
from vlm4vla.sims.film import GOP, Film

LOSS = 6
"""Mean absolute difference that the codec may make, of 255, on the pictures below."""
SIZES = {"main": (32, 48), "wrist": (16, 16)}
VIDEO = "videos/observation.images.main/chunk-000/file-{:03d}.mp4"


def picture(number, size):
    """Grey levels and a bright bar whose place tells the frame's number apart from its neighbours'."""
    height, width = size
    result = np.full((height, width, 3), 40 + 2 * (number % 50), np.uint8)
    at = number * 5 % (width - 4)
    result[:, at : at + 4] = 220
    return result


def raw(lengths, cameras=("main",)):
    """Per episode: pictures by camera, actions (T, 7), states (T, 2), task. Frame i of all shows ``picture(i)``."""
    rng, start, episodes = np.random.default_rng(0), 0, []
    for i, t in enumerate(lengths):
        images = {c: np.stack([picture(start + f, SIZES[c]) for f in range(t)]) for c in cameras}
        numbers = rng.normal(size=(t, 9)).astype(np.float32)
        episodes.append((images, numbers[:, :7], numbers[:, 7:], f"task {i % 2}"))
        start += t
    return episodes


def film(folder, episodes, per_file=100, fps=5.0):
    """Write ``episodes`` as a data set whose MP4 files hold ``per_file`` episodes each."""
    convention = CONVENTION if fps == 5 else writing.Convention(**{**CONVENTION.to_dict(), "control_hz": fps})
    work, encoded = folder.with_name(folder.name + "-films"), []
    work.mkdir()
    for first in range(0, len(episodes), per_file):
        with ExitStack() as stack:
            cameras = episodes[0][0]
            films = {c: stack.enter_context(Film(work / f"{first}-{c}.mp4", fps, SIZES[c])) for c in cameras}
            for images, actions, states, task in episodes[first : first + per_file]:
                encoded.append(Episode.encode(images, actions, states, task, films))
    write(folder, encoded, convention, {})
    shutil.rmtree(work)
    return folder


def shown(dataset, indices, camera="main"):
    """The numbers of the frames that the decoded pictures show (each differs from its neighbours')."""
    pictures = dataset.images(np.asarray(indices), camera).astype(int)
    known = np.stack([picture(i, SIZES[camera]) for i in range(dataset.num_frames)]).astype(int)
    distance = np.abs(pictures[:, None] - known[None]).mean((2, 3, 4))
    assert distance.min(1).max() < LOSS
    return distance.argmin(1).tolist()


def test_films_are_read_back_frame_by_frame(tmp_path):
    episodes = raw((5, 1, 7, 4), ("main", "wrist"))
    dataset = Dataset.open(film(tmp_path / "demos", episodes, per_file=2))
    assert dataset.cameras == SIZES
    assert (dataset.actions == np.concatenate([e[1] for e in episodes])).all()
    assert (dataset.states == np.concatenate([e[2] for e in episodes])).all()
    assert dataset.instructions(np.array([0, 5, 6, 16])) == ["task 0", "task 1", "task 0", "task 1"]
    assert sorted(p.name for p in (tmp_path / "demos/videos/observation.images.wrist/chunk-000").iterdir()) == [
        "file-000.mp4",
        "file-001.mp4",
    ]
    everything = np.random.default_rng(1).permutation(17)
    for camera in SIZES:
        assert shown(dataset, everything, camera) == everything.tolist()
    assert shown(dataset, [3, 3, 16, 0, 16]) == [3, 3, 16, 0, 16]
    together = np.concatenate(list(dataset.batches()))
    assert (together == dataset.images(np.arange(17))).all()
    assert (frames(dataset) == together).all()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3), st.sampled_from([5.0, 20.0, 30.0, 12.5]))
def test_round_trip_of_any_cutting(tmp_path_factory, lengths, per_file, fps):
    dataset = Dataset.open(film(tmp_path_factory.mktemp("any") / "demos", raw(lengths), per_file, fps))
    everything = list(range(sum(lengths)))[::-1]
    assert shown(dataset, everything) == everything


def test_a_random_frame_costs_at_most_one_group_of_pictures(tmp_path, monkeypatch):
    dataset = Dataset.open(film(tmp_path / "demos", raw((40,))))
    decoded = []
    find = video._Reader._find

    def counting(self, *arguments):
        plain = self._seek

        def seek(time):
            plain(time)
            self.frames = (decoded.append(f.time) or f for f in self.frames)

        self._seek = seek
        return find(self, *arguments)

    monkeypatch.setattr(video._Reader, "_find", counting)
    assert shown(dataset, [37]) == [37]
    assert 1 <= len(decoded) <= GOP


def test_a_foreign_film_with_b_frames_and_long_groups_is_read(tmp_path):
    folder = film(tmp_path / "demos", raw((60,)))
    path = folder / VIDEO.format(0)
    pictures = Dataset.open(folder).images(np.arange(60))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "15", "bf": "3", "g": "30"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for one in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        container.mux(stream.encode())
    order = np.random.default_rng(0).permutation(60)
    assert shown(Dataset.open(folder), order) == order.tolist()


def test_lerobots_own_keys_are_there(tmp_path):
    folder = film(tmp_path / "demos", raw((3, 4)))
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    feature = info["features"]["observation.images.main"]
    assert (feature["dtype"], feature["shape"], feature["info"]["video.fps"]) == ("video", [32, 48, 3], 5)
    (row, other) = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert row["videos/observation.images.main/from_timestamp"] == 0
    assert row["videos/observation.images.main/to_timestamp"] == pytest.approx(0.6)
    assert other["videos/observation.images.main/from_timestamp"] == pytest.approx(0.6)
    assert "observation.images.main" not in pq.read_schema(folder / "data/chunk-000/file-000.parquet").names


def test_the_content_hash_sees_films(tmp_path):
    one = film(tmp_path / "one", raw((3, 4)))
    other = film(tmp_path / "other", [({"main": e[0]["main"] ^ 3}, *e[1:]) for e in raw((3, 4))])
    assert Dataset.open(one).content_hash != Dataset.open(other).content_hash


def slower(path):
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fps": 4}))


DAMAGE = {
    "cut short": (lambda f: os.truncate(f / VIDEO.format(0), (f / VIDEO.format(0)).stat().st_size // 2), "damaged"),
    "empty": (lambda f: os.truncate(f / VIDEO.format(0), 0), "damaged"),
    "missing": (lambda f: (f / VIDEO.format(0)).unlink(), "no such file"),
    "foreign": (lambda f: (f / VIDEO.format(0)).write_text("<html>not found</html>"), "damaged"),
    "another camera's": (
        lambda f: shutil.copy(f / VIDEO.format(0).replace("main", "wrist"), f / VIDEO.format(0)),
        r"pictures of \(16, 16\)",
    ),
    "a playlist": (lambda f: playlist(f / VIDEO.format(0)), "damaged"),
    "another rate": (lambda f: slower(f / "meta/info.json"), r"no frame at 0\.250 s"),
    "too few frames": (lambda f: film_of(f / VIDEO.format(0), 3), r"no frame at 0\.600 s; it ends at 0\.400 s"),
}


def playlist(path):
    path.rename(path.with_name("other.mp4"))
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


@pytest.mark.parametrize("template", ["../{video_key}.mp4", "/{video_key}.mp4", "{nothing}.mp4", "{", 5])
def test_films_lie_below_the_folder(tmp_path, template):
    folder = film(tmp_path / "demos", raw((3,), ("wrist",)))
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video_path": template}))
    with pytest.raises(UserError, match=r"info\.json: (the film|video_path)"):
        Dataset.open(folder)


def film_of(path, number):
    path.unlink()
    with Film(path, 5, SIZES["main"]) as mp4:
        mp4.add(np.stack([picture(i, SIZES["main"]) for i in range(number)]))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind):
    folder = film(tmp_path / "demos", raw((5, 5), ("main", "wrist")))
    damage, message = DAMAGE[kind]
    damage(folder)
    dataset = Dataset.open(folder)
    with pytest.raises(UserError, match=message) as error:
        dataset.images(np.arange(10))
    assert str(folder / VIDEO.format(0)) in error.value.found


def test_odd_sizes_are_refused_and_other_sizes_too(tmp_path):
    with pytest.raises(UserError, match="even sides"):
        Film(tmp_path / "odd.mp4", 5, (33, 48))


def old_version(folder, lengths, version):
    """A folder in the layout of lerobot's versions 2.0 and 2.1: a file an episode."""
    new = film(folder.with_name("new"), raw(lengths), per_file=1)
    table = pq.read_table(new / "data/chunk-000/file-000.parquet")
    (folder / "meta").mkdir(parents=True)
    info = json.loads((new / "meta/info.json").read_text())
    info |= {
        "codebase_version": version,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    rows = {"tasks": [], "episodes": []}
    for i, t in enumerate(lengths):
        chunk = f"chunk-{i // 2:03d}"
        data, mp4 = folder / "data" / chunk, folder / "videos" / chunk / "observation.images.main"
        data.mkdir(parents=True, exist_ok=True)
        mp4.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(sum(lengths[:i]), t), data / f"episode_{i:06d}.parquet")
        shutil.copy(new / VIDEO.format(i), mp4 / f"episode_{i:06d}.mp4")
        rows["episodes"].append({"episode_index": i, "tasks": [f"task {i % 2}"], "length": t})
    rows["tasks"] = [{"task_index": i, "task": f"task {i}"} for i in range(2)]
    for name, each in rows.items():
        (folder / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_older_versions_open(tmp_path, version):
    folder = old_version(tmp_path / "old", (4, 2, 5), version)
    dataset, new = Dataset.open(folder), Dataset.open(tmp_path / "new")
    assert shown(dataset, [10, 0, 5, 4]) == [10, 0, 5, 4]
    assert (dataset.actions == new.actions).all()
    assert dataset.episode_to.tolist() == [4, 6, 11]
    assert dataset.instructions(np.arange(11)) == new.instructions(np.arange(11))
    lines = (folder / "meta/episodes.jsonl").read_text().splitlines()
    (folder / "meta/episodes.jsonl").write_text("\n".join([lines[0], lines[2]]))
    with pytest.raises(UserError, match=r"episodes\.jsonl: gaps"):
        Dataset.open(folder)
    (folder / "meta/episodes.jsonl").unlink()
    with pytest.raises(UserError, match=r"episodes\.jsonl: no such file"):
        Dataset.open(folder)


def test_an_empty_episode_is_named(tmp_path):
    folder = film(tmp_path / "demos", raw((3, 4)))
    path = Path(folder / "meta/episodes/chunk-000/file-000.parquet")
    table = pq.read_table(path)
    at = table.column_names.index("dataset_to_index")
    pq.write_table(table.set_column(at, "dataset_to_index", [[3, 3]]), path)
    with pytest.raises(UserError, match=r"empty episode \[1\]"):
        Dataset.open(folder)


@pytest.mark.parametrize("version", ["v3", "v21"])
def test_folders_that_lerobot_itself_wrote(version, monkeypatch):
    """lerobot 0.4.4 and 0.3.3, AV1 films; frame i shows ``picture(i)`` and its numbers are i."""
    monkeypatch.setattr("test_films.SIZES", {"main": (64, 96), "wrist": (64, 64)})
    dataset = Dataset.open(Path(__file__).parent / f"lerobot_{version}")
    assert (dataset.num_frames, dataset.episode_to.tolist(), dataset.fps) == (17, [5, 8, 17], 10)
    assert dataset.actions[:, 3].tolist() == dataset.states[:, 0].tolist() == list(range(17))
    assert dataset.instructions(np.array([0, 4, 5, 8])) == ["task 0", "task 0", "task 1", "task 0"]
    order = np.random.default_rng(0).permutation(17)
    for camera in dataset.cameras:
        assert shown(dataset, order, camera) == order.tolist()
    with pytest.raises(UserError, match=r"data describe .* --convention"):
        _ = dataset.convention


READ_WITH_LEROBOT = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
d = LeRobotDataset("local/demos", root=sys.argv[1], video_backend="pyav")
items = [d[i] for i in range(len(d))]
pictures = {c: [(i[c] * 255).round().int().permute(1, 2, 0).tolist() for i in items] for c in d.meta.camera_keys}
print(json.dumps({"action": [i["action"].tolist() for i in items], "task": [i["task"] for i in items], **pictures}))
"""


@pytest.mark.compat
def test_lerobot_reads_our_films(tmp_path):
    folder = film(tmp_path / "demos", raw((5, 1, 7), ("main", "wrist")), per_file=2)
    read = json.loads(run_lerobot(tmp_path, READ_WITH_LEROBOT, folder)[0])
    ours = Dataset.open(folder)
    assert (np.float32(read["action"]) == ours.actions).all()
    assert read["task"] == ours.instructions(np.arange(13))
    for camera in SIZES:
        theirs = np.array(read[f"observation.images.{camera}"])
        assert np.abs(theirs - ours.images(np.arange(13), camera).astype(int)).max() <= 2
