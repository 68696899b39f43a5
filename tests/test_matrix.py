"""From a YAML file to cells, and what they still need."""

from dataclasses import replace

import pytest

import fake_stages
from vlm4vla.errors import UserError
from vlm4vla.sims import protocols
from vlm4vla.spec import RunSpec
from vlm4vla.studies.matrix import Study, curve_steps, load, plan
from vlm4vla.studies.store import Store
from vlm4vla.types import EpisodeResult

YAML = """
name: place
base:
  training: {steps: 300, learning_rate: 1e-3}
  data.protocol: fake/line/v1
matrix:
  treatment: [full, freeze_vision, scratch]
  seed: [0, 1]
overrides:
  - when: {treatment: scratch}
    set: {training.steps: 600}
  - when: {training.steps: 600, seed: 1}
    set: {training.learning_rate: 5e-4}
evaluate:
  protocols: [fake/a/v1, fake/b/v1]
  episodes: 10
"""


@pytest.fixture(autouse=True)
def _protocols(monkeypatch):
    monkeypatch.setattr(protocols, "protocol", fake_stages.protocol, raising=False)


@pytest.fixture
def write(tmp_path):
    def write(*changes):
        text = YAML
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.yaml").write_text(text)
        return tmp_path / "study.yaml"

    return write


def test_a_study_spans_its_matrix(write):
    cells = load(write()).cells()
    assert [(c.run.treatment, c.run.seed) for c in cells] == [
        (treatment, seed) for treatment in ("full", "freeze_vision", "scratch") for seed in (0, 1)
    ]
    assert [c.run.training.steps for c in cells] == [300] * 4 + [600] * 2
    assert [c.run.training.learning_rate for c in cells] == [1e-3] * 5 + [5e-4]
    assert all(c.run.training.batch_size == RunSpec().training.batch_size for c in cells)
    assert len({c.run_id for c in cells}) == 6
    assert cells[0].labels == {"treatment": "full", "seed": 0}
    assert cells[0].evaluate.protocols == ("fake/a/v1", "fake/b/v1")


def test_an_override_looks_for_the_number_that_yaml_reads_as_text(write):
    cells = load(write(("when: {treatment: scratch}", "when: {training.learning_rate: 1e-3}"))).cells()
    assert [c.run.training.steps for c in cells] == [600] * 6


def test_the_same_run_is_one_cell(write):
    assert len(load(write(("seed: [0, 1]", "seed: [0, 0, 1]"))).cells()) == 6
    explicit = load(write(("steps: 300", f"steps: 300, batch_size: {RunSpec().training.batch_size}"))).cells()
    assert [c.run_id for c in explicit] == [c.run_id for c in load(write()).cells()]


QUESTIONS, FACES = ({"conversations": f"/data/{name}/conversations.jsonl", "weight": 0.5} for name in ("q", "f"))


@pytest.mark.parametrize(
    ("mixtures", "told"),
    [
        ([[], [QUESTIONS]], ["none", "0.5 q/conversations.jsonl"]),
        (
            [[QUESTIONS], [FACES, {"folder": "more"}]],
            ["0.5 q/conversations.jsonl", "0.5 f/conversations.jsonl + 1 more"],
        ),
        ([[{"folder": "a/x/y"}], [{"folder": "b/x/y"}]], ["1 a/x/y", "1 b/x/y"]),
        (
            [[QUESTIONS], [QUESTIONS | {"images": "photographs"}]],
            ["0.5 /data/q/conversations.jsonl (1)", "0.5 /data/q/conversations.jsonl (2)"],
        ),
        ([[QUESTIONS], [QUESTIONS | {"weight": "0.5"}]], ["0.5 q/conversations.jsonl"]),
    ],
)
def test_titles_tell_mixtures_apart_in_few_words(mixtures, told):
    cells = Study(name="mixed", matrix={"data.mixture": mixtures, "seed": [0, 1]}).cells()
    assert [cell.title for cell in cells[::2]] == [f"full, data.mixture={text}" for text in told]
    assert cells[0].run.data == RunSpec.model_validate({"data": {"mixture": mixtures[0]}}).data


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  seed: [0, 1]", "  sed: [0, 1]", r"sed \(nearest: seed\)"),
        ("{steps: 300,", "{stepz: 300,", r"training.stepz \(nearest: training.steps"),
        ("set: {training.steps", "set: {training.step", "nearest: training.steps"),
        ("when: {treatment: scratch}", "when: {treatmen: scratch}", "nearest: treatment"),
        ("scratch]", "skratch]", "treatment: no treatment of that name.*found 'skratch'"),
        ("seed: [0, 1]", "seed: []", "no value for seed"),
        ("evaluate:", "evaluation:", r"unknown key \(nearest: evaluate\)"),
        ("fake/b/v1", "other/b/v1", "no protocol 'other/b/v1'"),
        ("  data.protocol: fake/line/v1", "  data.protocol: null", "one of the two"),
        ("name: place", "name: ''", "at least 1 character"),
        ("matrix:", "matrix: [", "not YAML"),
        ("when: {treatment: scratch}", "when: {treatment: freeze_llm}", "no cell for the override.*freeze_llm"),
        ("when: {treatment: scratch}", "when: {treatment: scrach}", "`when`: treatment: no treatment of that name"),
    ],
)
def test_mistakes_name_what_was_meant(write, old, new, message):
    with pytest.raises(UserError, match=message):
        load(write((old, new)))


def test_steps_of_the_curve_are_those_the_loop_keeps():
    def steps(number, checkpoints):
        return curve_steps(RunSpec.model_validate({"training": {"steps": number, "checkpoints": checkpoints}}))

    assert steps(1000, 1) == []
    assert steps(1000, 4) == [250, 500, 750]
    assert steps(100, 3) == [33, 67]
    assert steps(2, 8) == [1]


def test_plan_tells_done_from_missing(write, tmp_path):
    study = load(write())
    assert {row.status for row in plan(study).rows} == {"todo"}
    assert {row.status for row in plan(study, tmp_path / "none").rows} == {"todo"}
    assert not (tmp_path / "none").exists()
    first, second, third, *_ = [cell.run_id for cell in study.cells()]

    def result(protocol, episode, success=True):
        return EpisodeResult(protocol, episode, episode, success, 3)

    with Store(tmp_path / "results.sqlite") as store:
        for protocol in study.evaluate.protocols:
            for i in range(10):
                store.add(first, result(protocol, i))
        for i in range(10):
            store.add(second, result("fake/a/v1", i, None if i == 3 else False))
        store.add(second, result("fake/a/v1", 10))  # beyond what is asked for
        store.set_run(third, status="failed", message="no room")
    planned = plan(study, tmp_path)
    assert [row.status for row in planned.rows] == ["done", "partial", "todo", "todo", "todo", "todo"]
    assert planned.rows[1].missing == {"fake/a/v1": 1, "fake/b/v1": 10}
    text = str(planned)
    assert "place: 1 of 6 cells done" in text
    assert "1 fake/a/v1, 10 fake/b/v1" in text
    assert f"{third} failed: no room" in text
    assert Study.model_validate(study.model_dump()) == study


def test_what_a_protocol_cannot_give_is_found_before_the_training(write, monkeypatch):
    named = fake_stages.protocol("fake/a/v1")
    short = replace(named, num_episodes=9)
    monkeypatch.setattr(protocols, "protocol", lambda name: short)
    with pytest.raises(UserError, match="10 episodes of fake/a/v1"):
        load(write())
    long = replace(named, execute=RunSpec().head.chunk + 1)
    monkeypatch.setattr(protocols, "protocol", lambda name: long)
    with pytest.raises(UserError, match=r"(?s)head\.chunk=6.*fake/a/v1\+execute=6"):
        load(write())
