"""Training a policy: what stays in its folder, and whose a finished one is."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fake_sim import CONVENTION
from test_films import film, raw
from vlm4vla.arguments import trained_on, with_set
from vlm4vla.backbones import tiny
from vlm4vla.backbones.vlm import parameters_hash, save_vlm
from vlm4vla.cli import cli
from vlm4vla.data.record import recording
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError
from vlm4vla.policy import Policy
from vlm4vla.skills.questions import words
from vlm4vla.spec import DataSpec, RunSpec, Runtime, TrainSpec
from vlm4vla.training.imitation import train

QUIET = Runtime(device="cpu", progress=False)


def demonstrations(folder, seed=0, data=None):
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(2, 8, 7)).astype(np.float32)
    actions[..., -1] = actions[..., -1] > 0
    images = {"main": rng.integers(0, 256, (8, 96, 96, 3), np.uint8)}
    episodes = [Episode.encode(images, a, None, "place it on cat") for a in actions]
    write(folder, episodes, CONVENTION, {"recording": recording(data)} if data else {})
    return folder


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "vlm").mkdir()
    save_vlm(*tiny.build(["cat"], words(), 0), tmp_path / "vlm")
    training = TrainSpec(steps=2, batch_size=4)
    return RunSpec(backbone=str(tmp_path / "vlm"), data=DataSpec(folder="demos"), training=training)


def test_a_finished_policy_is_returned_for_the_same_run_only(spec, tmp_path):
    demos, out = demonstrations(tmp_path / "demos"), tmp_path / "out"
    train(spec, demos, out, QUIET)
    made = (out / "policy").stat().st_mtime_ns
    train(spec, demos, out, QUIET)
    assert (out / "policy").stat().st_mtime_ns == made
    with pytest.raises(UserError, match="belongs to the run"):
        train(spec.model_copy(update={"seed": 1}), demos, out, QUIET)
    with pytest.raises(UserError, match="belongs to the run"):
        train(spec, demonstrations(tmp_path / "others", seed=1), out, QUIET)


def test_all_that_is_known_of_a_run_appears_with_its_policy(spec, tmp_path):
    """A file written after it would be lost by a kill between the two."""
    train(spec, demonstrations(tmp_path / "demos"), tmp_path / "out", QUIET)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"policy", "finished.json", "metrics.jsonl", "training.lock"}
    card = json.loads((tmp_path / "out" / "policy" / "policy.json").read_text())["card"]
    assert (card["run_id"], card["episodes"], card["frames"]) == (spec.run_id, 2, 16)
    assert Policy.load(tmp_path / "out" / "policy").spec == spec


def test_films_of_another_size_train_with_and_without_a_cache_to_the_same_weights(spec, tmp_path):
    episodes = [({"main": np.zeros((5, 32, 48, 3), np.uint8) + 40 * i}, *e[1:]) for i, e in enumerate(raw((5, 5)))]
    for _, actions, *_ in episodes:
        actions[:, -1] = actions[:, -1] > 0
    demos = film(tmp_path / "demos", episodes)
    with pytest.raises(UserError, match=r"square ones.*\n.*data.image_size"):
        train(spec, demos, tmp_path / "none", QUIET)
    wrist = film(tmp_path / "wrist", raw((3,), ("wrist",)))
    with pytest.raises(UserError, match="a camera named 'main'"):
        train(spec.model_copy(update={"data": DataSpec(folder="x", image_size=96)}), wrist, tmp_path / "none", QUIET)
    training = spec.training.model_copy(update={"augment": "crop_and_colour"})
    spec = spec.model_copy(update={"data": DataSpec(folder="demos", image_size=96), "training": training})
    train(spec, demos, tmp_path / "cached", QUIET)
    train(spec, demos, tmp_path / "decoded", Runtime(device="cpu", progress=False, cache=False))
    cached, decoded = (Policy.load(tmp_path / name / "policy") for name in ("cached", "decoded"))
    assert parameters_hash(cached.vla) == parameters_hash(decoded.vla)
    assert cached.image_size == 96
    (path,) = (demos / ".cache").iterdir()
    assert path.name.startswith("main-96-")


@pytest.mark.parametrize("recorded", [None, DataSpec(seed=1), DataSpec(protocol="grinningface/place/train/dev")])
def test_other_demonstrations_than_the_spec_describes_are_named_in_it(tmp_path, recorded):
    demos = demonstrations(tmp_path / "demos", data=recorded)
    spec, protocol = trained_on(RunSpec(), demos)
    assert spec == RunSpec(data=DataSpec(folder=str(demos)))
    assert protocol == (recorded.protocol if recorded else None)
    assert trained_on(spec, demos) == (spec, protocol)
    assert trained_on(RunSpec(data=DataSpec(folder="elsewhere")), demos)[0] == spec


def test_a_spec_stays_where_the_folder_is_the_recording_it_describes(tmp_path):
    spec = RunSpec(data=DataSpec(seed=3, episodes=2))
    demos = demonstrations(tmp_path / "demos", data=spec.data)
    assert trained_on(spec, demos) == (spec, spec.data.protocol)


def test_train_says_what_it_trained_on_and_where_to_judge_it(spec, tmp_path):
    name = "grinningface/place/train/dev"
    demos = demonstrations(tmp_path / "demos", data=DataSpec(protocol=name))
    sets = [f"backbone={spec.backbone}", "training.steps=1", "training.batch_size=2"]
    out = tmp_path / "my runs"
    arguments = ["--data", str(demos), "--out", str(out), "--device", "cpu", *with_set(tuple(sets))]
    done = CliRunner().invoke(cli, ["train", *arguments], catch_exceptions=False)
    assert f"next: vlm4vla eval '{out}/policy' --protocol {name}" in done.stderr
    assert "names the folder" in done.stderr
    assert Policy.load(out / "policy").spec.data.folder == str(demos)


def test_the_hash_of_weights_tells_values_and_names_apart_whatever_their_shape():
    def module(name, value):
        made = torch.nn.Module()
        made.register_parameter(name, torch.nn.Parameter(torch.tensor(value)))
        return made

    scalars = [module("scale", 1.0), module("scale", 2.0), module("other", 1.0), module("scale", [1.0, 2.0])]
    assert len({parameters_hash(each) for each in scalars}) == 4
    assert parameters_hash(scalars[0]) == parameters_hash(module("scale", 1.0))
