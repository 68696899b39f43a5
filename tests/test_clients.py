"""Policies in other processes: what they are sent, how their actions are read, and that nothing is guessed."""

import io
import json
import os
import re
import socket
import threading
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

import stand_ins
from fake_sim import CONVENTION, FIRST_SEED, FakePolicy, protocol
from policy_server import expected, picture, running, service
from vlm4vla.cli import cli
from vlm4vla.convention import LIBERO
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError
from vlm4vla.evaluation.rollout import evaluate
from vlm4vla.serving.baseline import SHIPPED, Picture, baseline, crop
from vlm4vla.serving.sources import album, home, opened
from vlm4vla.studies.store import Store
from vlm4vla.types import Observation

TESTS = str(Path(__file__).parent)
DOCS = Path(__file__).parents[1] / "docs"


def libero(shade=100, size=256, instruction="Put the bowl on the stove", **cameras):
    """What a LIBERO simulator would give a pi0-like policy."""
    pictures = {"main": noise(size, shade), "wrist": noise(size, shade + 1), **cameras}
    return Observation(pictures, instruction, np.arange(8, dtype=np.float32))


def noise(size, seed):
    """A picture with structure at all scales, as photographs have."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------- other projects' servers


def test_pi0_on_libero():
    seen = []

    def infer(observation):
        seen.append(observation)
        actions = np.tile(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -0.7]), (10, 1))
        actions[5:, 6] = 0.9  # robosuite: above 0 closes
        return {"actions": actions, "state": observation["observation/state"], "policy_timing": {"infer_ms": 1.0}}

    with (
        stand_ins.websocket({}, infer) as address,
        opened(f"openpi://{address}", view="pi0_libero", name="pi05_libero") as source,
    ):
        assert source.name.startswith("pi05_libero-")
        assert (source.chunk, source.image_size) == (10, 256)
        chunks = source.policy.predict([libero(1), libero(2)])
    assert len(chunks) == 2
    assert chunks[0].convention == LIBERO
    np.testing.assert_allclose(chunks[0].actions[:, :6], np.tile(np.arange(1, 7) / 10, (10, 1)), rtol=1e-6)
    assert chunks[0].actions[:, 6].tolist() == [1] * 5 + [0] * 5, "open until the server closes the gripper"
    for observation in seen:
        assert observation.keys() == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
        assert observation["prompt"] == "Put the bowl on the stove"
        np.testing.assert_array_equal(observation["observation/state"], np.arange(8))
    want = np.asarray(Image.fromarray(noise(256, 1)).resize((224, 224), Image.Resampling.BILINEAR))
    assert any(np.array_equal(observation["observation/image"], want) for observation in seen)


@pytest.mark.compat
def test_pi0s_pictures_are_those_of_its_own_client():
    image_tools = pytest.importorskip("openpi_client.image_tools", reason="install it: make compat")
    ours = baseline("pi0_libero").picture.prepare(noise(256, 3))
    np.testing.assert_array_equal(
        ours, image_tools.convert_to_uint8(image_tools.resize_with_pad(noise(256, 3), 224, 224))
    )


@pytest.mark.parametrize("encoded_twice", [False, True])
def test_openvla_on_libero(encoded_twice):
    seen = []

    def act(request):
        seen.append(request)
        return np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.996 if len(seen) == 1 else 0.004])

    view = "openvla_libero_10"
    with (
        stand_ins.openvla(act, encoded_twice) as address,
        opened(f"openvla://{address}", view=view, name="x") as source,
    ):
        chunks = source.policy.predict([libero(1), libero(2)])
    assert [chunk.actions.shape for chunk in chunks] == [(1, 7)] * 2
    np.testing.assert_allclose(chunks[0].actions[0, :6], np.arange(1, 7) / 10, rtol=1e-6)
    assert [chunk.actions[0, 6] for chunk in chunks] == [1, 0], "its loader made 1 open"
    request = seen[0]
    assert request.keys() == {"image", "instruction", "unnorm_key"}
    assert (request["instruction"], request["unnorm_key"]) == ("Put the bowl on the stove", "libero_10_no_noops")
    assert (request["image"].shape, request["image"].dtype) == ((224, 224, 3), np.uint8)
    np.testing.assert_array_equal(request["image"], baseline(view).picture.prepare(noise(256, 1)))


def test_openvla_on_bridge():
    with (
        stand_ins.openvla(lambda request: np.array([0.01, 0, 0, 0.1, 0, 0, 1.0])) as address,
        opened(f"openvla://{address}", view="openvla_bridge", name="x") as source,
    ):
        (chunk,) = source.policy.predict([libero(size=224)])
    np.testing.assert_allclose(chunk.actions, [[0.01, 0, 0, 0.1, 0, 0, 1]], rtol=1e-6)
    assert chunk.convention.position_unit == "metre"


STARVLA = {
    "dialect": "starvla", "form": "libero_rlds", "chunk": 2, "picture": {"render": 32, "size": 24, "resize": "bicubic"},
    "cameras": {"main": "0", "wrist": "1"}, "state": "state", "lower": True, "unnorm_key": "franka",
}  # fmt: skip


@pytest.fixture
def starvla(tmp_path):
    (tmp_path / "starvla.yaml").write_text(yaml.safe_dump(STARVLA))
    return str(tmp_path / "starvla.yaml")


def test_starvla(starvla):
    seen = []

    def infer(request):
        seen.append(request)
        actions = np.zeros((len(request["examples"]), 2, 7), np.float32)
        actions[:, 1, 6] = 1
        return {
            "status": "ok",
            "ok": True,
            "type": "inference_result",
            "request_id": "default",
            "data": {"actions": actions},
        }

    with (
        stand_ins.websocket({"action_chunk_size": 2}, infer) as address,
        opened(f"starvla://{address}", view=starvla, name="qwen") as source,
    ):
        chunks = source.policy.predict([libero(size=32), libero(size=32)])
    assert [chunk.actions[:, 6].tolist() for chunk in chunks] == [[0, 1]] * 2
    (request,) = seen
    assert request["unnorm_key"] == "franka"
    example = request["examples"][1]
    assert [image.shape for image in example["image"]] == [(24, 24, 3)] * 2
    assert example["lang"] == "put the bowl on the stove"
    assert example["state"].shape == (1, 8)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"status": "error", "ok": False, "error": {"message": "no such key"}}, "no such key"),
        ({"status": "ok", "ok": True, "data": {"normalized_actions": np.zeros((1, 2, 7))}}, "normalised"),
        ({"status": "ok", "ok": True, "data": {"actions": np.zeros((1, 1, 7))}}, "2 or more"),
        ({"status": "ok", "ok": True, "data": {"actions": np.zeros((1, 2, 8))}}, "shape"),
        ({"status": "ok", "ok": True, "data": {"actions": np.full((1, 2, 7), np.nan)}}, "not finite"),
        ({"status": "ok", "ok": True, "data": {"actions": [[1.0]]}}, "no actions"),
        ("Traceback: CUDA out of memory", "CUDA out of memory"),
    ],
)
def test_strange_answers_are_told(starvla, reply, words):
    with (
        stand_ins.websocket({}, lambda request: reply) as address,
        opened(f"starvla://{address}", view=starvla, name="x") as source,
        pytest.raises(UserError, match=words),
    ):
        source.policy.predict([libero(size=32)])


def test_openvlas_error_is_told():
    with (
        stand_ins.openvla(lambda request: "error") as address,
        opened(f"openvla://{address}", view="openvla_bridge", name="x") as source,
        pytest.raises(UserError, match="its log says more"),
    ):
        source.policy.predict([libero(size=224)])


def test_openvlas_service_is_asked_past_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with (
        stand_ins.openvla(lambda request: np.zeros(7)) as address,
        opened(f"openvla://{address}", view="openvla_bridge", name="x") as source,
    ):
        assert len(source.policy.predict([libero(size=224)])) == 1


def test_a_port_that_speaks_no_http_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble():
            with listener.accept()[0] as client:
                client.recv(1 << 20)
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            opened(f"openvla://{address}", view="openvla_bridge", name="x") as source,
            pytest.raises(UserError, match="BadStatusLine"),
        ):
            source.policy.predict([libero(size=224)])
        thread.join(20)


def test_a_server_that_dies_is_told_and_one_that_comes_back_is_used():
    def answer(request):
        return {"actions": np.zeros((10, 7))}

    with (
        stand_ins.websocket({}, answer) as address,
        opened(f"openpi://{address}", view="pi0_libero", name="x") as source,
    ):
        source.policy.predict([libero()])
        (idle,) = [source.policy._idle.get()]
        idle.close()
        source.policy._idle.put(idle)
        assert len(source.policy.predict([libero()])) == 1, "servers drop idle connections"
    gone = pytest.raises(UserError, match="finished episodes are kept")
    with gone, opened(f"openpi://{address}", view="pi0_libero", name="x"):
        pass


def test_the_last_idle_connection_that_another_thread_takes_is_not_waited_for():
    with (
        stand_ins.websocket({}, lambda request: {"actions": np.zeros((10, 7))}) as address,
        opened(f"openpi://{address}", view="pi0_libero", name="x") as source,
    ):
        source.policy._idle = Snatched()
        thread = threading.Thread(target=source.policy.predict, args=([libero()],), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


class Snatched(SimpleQueue):
    """Looks full, and is empty by the time one asks."""

    def empty(self):
        return False


# -------------------------------------------------------------------------------------------------- what has to be said


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("openvla://localhost:1", {}, "--baseline"),
        ("openvla://localhost:1", {"view": "openvla_bridge"}, "--name"),
        ("openvla://localhost:1", {"view": "openvla_brigde", "name": "x"}, "nearest: openvla_bridge"),
        ("openvla://localhost:1", {"view": "pi0_libero", "name": "x"}, "openpi://localhost:1"),
        ("openvla://localhost", {"view": "openvla_bridge", "name": "x"}, "host:port"),
        ("openvla://a b:1/x?y", {"view": "openvla_bridge", "name": "x"}, "host:port"),
        ("openpi://127.0.0.1:1", {}, "no answer"),
        ("openpi://127.0.0.1:99999", {}, "openpi://host:port"),
        ("runs/nothing", {}, "policy.json"),
        ("runs/nothing", {"name": "x"}, "leave them out"),
        ("replay:runs/nothing", {}, "nothing"),
        ("random:", {}, "random: without a folder"),
    ],
)
def test_what_is_not_said_is_asked_for(text, options, words):
    with pytest.raises(UserError, match=words), opened(text, "cpu", **options):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("random:data", r"next: judge it: vlm4vla eval random:data --protocol NAME"),
        ("openpi://host:1", r"next: judge it: vlm4vla eval openpi://host:1 --protocol NAME"),
        ("runs/mine", r"no runs/mine/policy.json\n(.*)\nnext: name runs/mine/policy"),
        ("runs/mien/policy", r"no runs/mien/policy/policy.json \(nearest in runs: mine\)"),
    ],
)
def test_what_cannot_be_served_is_told_with_what_can(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "policy").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "policy" / "policy.json").touch()
    told = CliRunner().invoke(cli, ["serve", text]).exception
    assert isinstance(told, UserError)
    assert re.search(words, str(told))
    if ":" not in text:
        told = CliRunner().invoke(cli, ["policy", "merge", text, "--out", "x"]).exception
        assert re.search(words, str(told))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "native"}, "form"),
        ({"form": "liberro"}, "nearest: libero"),
        ({"colour": "red"}, "unknown key"),
        ({"picture": {"render": 32, "size": 24}}, "resize"),
        ({"dialect": "openvla"}, "one camera"),
    ],
)
def test_wrong_baselines_are_told(tmp_path, change, words):
    path = tmp_path / "b.yaml"
    path.write_text(yaml.safe_dump(STARVLA | change))
    with pytest.raises(UserError, match=words):
        baseline(str(path))


def test_shipped_baselines_open_and_have_a_page():
    pages = "\n".join(path.read_text() for path in (DOCS / "baselines").glob("*.md"))
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    assert len(names) >= 3
    for name in names:
        assert baseline(name).chunk
        assert f"`{name}`" in pages


@pytest.mark.parametrize("page", ["serving.md", "baselines/thinkact.md"])
def test_the_baselines_written_in_the_docs_work(tmp_path, page):
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (tmp_path / "b.yaml").write_text(text)
    look = baseline(str(tmp_path / "b.yaml"))

    def infer(request):
        actions = np.full((8, 7), -1.0)
        return {"ok": True, "data": {"actions": actions[None]}} if "examples" in request else {"actions": actions}

    with (
        stand_ins.websocket({}, infer) as address,
        opened(f"{look.dialect}://{address}", view=str(tmp_path / "b.yaml"), name="x") as source,
    ):
        pictures = {"main": noise(256, 1), "agentview": noise(256, 2)}
        (chunk,) = source.policy.predict([Observation(pictures, "go", np.zeros(8, np.float32))])
    assert chunk.actions.shape == (8, 7)
    assert chunk.actions[0, 6] == (look.form == "libero"), "-1 is open for one, closed for the other"


def test_a_camera_or_state_that_is_missing_is_told():
    with (
        stand_ins.websocket({}, lambda request: {"actions": np.zeros((10, 7))}) as address,
        opened(f"openpi://{address}", view="pi0_libero", name="x") as source,
    ):
        assert source.cameras == ("main", "wrist"), "which the simulator is then asked for"
        whole = libero()
        for wrong, words in (
            (Observation({"main": whole.images["main"]}, "go", whole.state), "wrist"),
            (Observation(whole.images, "go"), "state"),
            (libero(size=128), "256 x 256"),
        ):
            with pytest.raises(UserError, match=words):
                source.policy.predict([wrong])


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_films_of_two_policies_do_not_meet(tmp_path):
    folders = [tmp_path / name for name in ("policy", "policies/step-000100", "policies/step-000200")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert [album(f"{folder}/") for folder in folders] == ["", "step-000100", "step-000200"]
    assert album("openpi://127.0.0.1:8000") == "", "its home is its own"


def test_the_crop_is_tensorflows():
    """Against its definition (corners aligned), pixel by pixel."""
    image, size = noise(24, 5), 24
    ours = crop(image, 0.9)
    side = 0.9**0.5
    low = (1 - side) / 2
    for y, x in ((0, 0), (0, 23), (7, 11), (23, 23), (16, 2)):
        at = [low * (size - 1) + i * (side * (size - 1)) / (size - 1) for i in (y, x)]
        floor = [int(value) for value in at]
        part = [value - low for value, low in zip(at, floor, strict=True)]
        corners = image[floor[0] : floor[0] + 2, floor[1] : floor[1] + 2].astype(float)
        value = sum(
            corners[i, j] * (part[0] if i else 1 - part[0]) * (part[1] if j else 1 - part[1])
            for i in range(2) for j in range(2)
        )  # fmt: skip
        assert np.abs(ours[y, x] - np.floor(value / 255 * 255.5)).max() <= 1
    np.testing.assert_array_equal(crop(image, 1.0), image)


def test_jpeg_comes_before_resizing():
    image = noise(256, 6)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=2)
    want = Image.open(file).resize((224, 224), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(
        Picture(render=256, jpeg=95, size=224, resize="lanczos").prepare(image), np.asarray(want)
    )


# ------------------------------------------------------------------------------------------------------- our own server


@pytest.mark.parametrize("scheme", ["openpi", "starvla"])
@pytest.mark.parametrize("form", [None, "native", "libero"])
def test_our_own_server_needs_no_baseline(scheme, form):
    policy = FakePolicy(LIBERO if form == "libero" else CONVENTION)
    with running(service(policy, form=form), token="sesame") as server:
        address = f"127.0.0.1:{server.server.ports[scheme]}"
        with pytest.raises(UserError, match="401"), opened(f"{scheme}://{address}"):
            pass
        with opened(f"{scheme}://{address}", token="sesame") as source:
            assert (source.name, source.chunk, source.image_size) == ("fake", 4, 8)
            chunks = source.policy.predict([Observation({"main": picture(shade)}, "go") for shade in (30, 40, 50)])
    for chunk, shade in zip(chunks, (30, 40, 50), strict=True):
        assert chunk.convention == policy.convention
        np.testing.assert_allclose(chunk.actions, expected(shade), atol=1e-6)


def test_a_served_checkpoint_acts_as_the_folder_does(policy_folder):
    from vlm4vla.serving.service import Service
    from vlm4vla.serving.sources import checkpoint

    local = checkpoint(str(policy_folder), "cpu")
    look = [Observation({"main": noise(96, seed)}, "place it on cat") for seed in range(3)]
    with running(Service(local)) as server, opened(f"openpi://127.0.0.1:{server.server.ports['openpi']}") as remote:
        assert remote.name == local.name
        for a, b in zip(local.policy.predict(look), remote.policy.predict(look), strict=True):
            np.testing.assert_allclose(a.actions, b.actions, atol=1e-5)


def test_the_episode_loop_takes_any_source(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    options = {"image_size": 8, "workers": 2, "progress": False}
    with Store(tmp_path / "results.sqlite") as store:
        local = evaluate(FakePolicy(), protocol(), 6, store, "local", **options)
        with running() as server, opened(f"openpi://127.0.0.1:{server.server.ports['openpi']}") as source:
            remote = evaluate(source.policy, protocol(), 6, store, source.name, **options)
    assert [(r.success, r.steps) for r in remote] == [(r.success, r.steps) for r in local]


# --------------------------------------------------------------------------------------------------- data sets' actions


def recording(folder, instructions=("go to 0 (seed 1000)", "go to 0 (seed 1002)"), failed=()):
    rng = np.random.default_rng(0)
    episodes = []
    for i, text in enumerate(instructions):
        actions = rng.normal(size=(5 + i, 7)).astype(np.float32)
        actions[:, -1] = actions[:, -1] > 0
        episodes.append(Episode.encode({"main": np.zeros((5 + i, 8, 8, 3), np.uint8)}, actions, None, text))
    write(folder, episodes, CONVENTION, {"failed_seeds": list(failed)})
    return folder


def look(episode, step, instruction=None):
    return Observation(
        {"main": picture()}, instruction or f"go to 0 (seed {FIRST_SEED + episode})", None, episode, step
    )


def test_replay(tmp_path):
    from vlm4vla.data.lerobot import Dataset

    folder = recording(tmp_path / "data", failed=[1])
    data = Dataset.open(folder)
    with opened(f"replay:{folder}") as source:
        first, later, second = source.policy.predict([look(0, 0), look(0, 3), look(2, 0)])
        np.testing.assert_array_equal(first.actions[:5], data.actions[:5])
        np.testing.assert_array_equal(later.actions[:2], data.actions[3:5])
        assert not later.actions[2:, :6].any(), "then the arm stays"
        assert (later.actions[2:, 6] == data.actions[4, 6]).all(), "and the gripper as it is"
        np.testing.assert_array_equal(second.actions[:6], data.actions[5:11])
        for wrong, words in (
            (look(1, 0), "no recording"),
            (look(9, 0), "--episodes 2"),
            (look(0, 0, "dance"), "recorded"),
        ):
            with pytest.raises(UserError, match=words):
                source.policy.predict([wrong])
        assert home(f"replay:{folder}", source) == Path("runs") / source.name


def test_random_actions_are_in_range_and_repeatable(tmp_path):
    from vlm4vla.data.lerobot import Dataset

    folder = recording(tmp_path / "data")
    data = Dataset.open(folder)
    with opened(f"random:{folder}") as source:
        a, b, again = source.policy.predict([look(0, 0), look(0, 4), look(0, 0)])
    np.testing.assert_array_equal(a.actions, again.actions)
    assert not np.array_equal(a.actions, b.actions)
    assert (a.actions >= data.actions.min(0)).all()
    assert (a.actions <= data.actions.max(0)).all()
    assert set(a.actions[:, 6]) == {0, 1}


@pytest.mark.sim
def test_a_recording_replayed_succeeds(tmp_path, monkeypatch):
    """The whole way: expert, data set, replay through the command line."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ["data", "record", "--out", "data", "--set", "data.episodes=3", "--set", "data.noise=0", "--workers", "1"],
        ["eval", "replay:data", "--protocol", "grinningface/place/id/v1", "--episodes", "3", "--workers", "1"],
    ):
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert "success 100%" in done.output
    assert list((tmp_path / "runs").glob("replay-*/eval.sqlite"))
    json.loads(next((tmp_path / "runs").glob("replay-*/strips/*.json")).read_text())
    assert threading.active_count() < 10
