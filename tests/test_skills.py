"""The VLM stage: questions are true of their scenes, packing changes nothing, and a step learns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm4vla.backbones import tiny
from vlm4vla.data.vqa import Conversations
from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics
from vlm4vla.skills import build
from vlm4vla.skills.conversations import NAME, make_folder, write_conversations
from vlm4vla.skills.questions import NUMBERS, PLACES, POINT_BINS, Scenes, ask, point_answer, words
from vlm4vla.skills.score import score
from vlm4vla.skills.stage import QUESTIONS, Stage, cell_labels
from vlm4vla.spec import Runtime, TrainSpec
from vlm4vla.training.loop import fit

NAMES = ("cat", "dog", "red apple", "ant")


def make_scenes(n: int = 12) -> Scenes:
    """Half rows, half scattered with one card hidden; every card is a square in its own grey."""
    rng = np.random.default_rng(0)
    images = np.full((n, 96, 96, 3), 128, np.uint8)
    cards = np.full((n, 9), -1, np.int16)
    card_uv, card_size = np.zeros((2, n, 9, 2), np.float32)
    row = np.arange(n) % 2 == 0
    for i in range(n):
        cards[i, :3] = rng.permutation(4)[:3]
        card_uv[i, :3] = [[0.2, 0.7], [0.5, 0.7], [0.8, 0.7]]
        card_size[i, :3] = 0.2
        for k in range(3):
            u, v = (card_uv[i, k] * 96).astype(int)
            images[i, v - 9 : v + 9, u - 9 : u + 9] = 60 * cards[i, k]
        if not row[i]:
            cards[i, 1] = -1
    block = np.where(np.arange(n)[:, None] % 3 == 0, np.nan, 0.4).astype(np.float32) * np.ones((n, 2), np.float32)
    return Scenes(images, cards, card_uv, card_size, row, block, np.full((n, 2), 0.3, np.float32), NAMES)


@pytest.fixture(scope="module")
def vlm_and_processor():
    return tiny.build(NAMES, words(), seed=0)


def test_answers_are_true_of_the_scene():
    scenes, tasks = make_scenes(), set()
    rng = np.random.default_rng(0)
    for i in range(len(scenes)):
        here = {NAMES[k]: c for c, k in enumerate(scenes.cards[i]) if k >= 0}
        for q in ask(scenes, i, 60, rng):
            tasks.add(q.task)
            if q.task == "where":
                assert q.answer == (PLACES[here[q.name]] if q.name in here else "none")
                assert q.name in q.question
            elif q.task == "what":
                side = next(p for p in PLACES if p in q.question)
                assert here[q.answer] == PLACES.index(side)
            elif q.task == "count":
                assert NUMBERS.index(q.answer) == len(here)
            elif q.task == "present":
                assert (q.answer == "yes") == any(name in q.question.split(" a ")[1] for name in here)
            elif q.task == "left_of":
                assert here[q.answer] == min(here[name] for name in here if name in q.question)
            elif q.name:
                assert q.name in q.question
                assert q.answer == point_answer(scenes.card_uv[i, here[q.name]])
            else:
                thing = scenes.block_uv[i] if q.question.endswith("block") else scenes.gripper_uv[i]
                assert q.answer == point_answer(thing)
    assert tasks == {"where", "what", "left_of", "point", "present", "count"}


def test_a_point_stays_on_the_grid():
    assert point_answer(np.array([0.0, 0.999])) == f"x0 y{POINT_BINS - 1}"
    assert point_answer(np.array([-0.2, 1.3])) == f"x0 y{POINT_BINS - 1}"


def test_cells_are_labelled_with_the_card_that_covers_them():
    labels = cell_labels(make_scenes())[0].reshape(tiny.GRID, tiny.GRID)
    scenes = make_scenes()
    column, row = int(0.5 * tiny.GRID), int(0.7 * tiny.GRID)
    assert labels[row, column] == scenes.cards[0, 1]
    assert labels[0, 0] == len(NAMES)


def test_packed_questions_equal_each_question_alone(vlm_and_processor):
    vlm, processor = vlm_and_processor
    stage = Stage(vlm, processor, make_scenes(), instruct=True)
    batch = stage.batch(np.array([0, 1]), np.random.default_rng(3))
    packed = vlm.model(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    ).last_hidden_state
    prefix = 1 + tiny.GRID**2
    start = (batch["position_ids"] == prefix).nonzero().tolist()
    assert len(start) >= 2 * QUESTIONS
    for b, at in (start[1], start[-1]):
        end = at + 1
        while end < batch["input_ids"].shape[1] and batch["position_ids"][b, end] == end - at + prefix:
            end += 1
        alone = torch.cat([batch["input_ids"][b, :prefix], batch["input_ids"][b, at:end]])[None]
        hidden = vlm.model(input_ids=alone, pixel_values=batch["pixel_values"][b : b + 1]).last_hidden_state
        torch.testing.assert_close(packed[b, at:end], hidden[0, prefix:], atol=1e-5, rtol=1e-5)


def test_labels_are_the_answers(vlm_and_processor):
    vlm, processor = vlm_and_processor
    stage = Stage(vlm, processor, make_scenes(), instruct=True)
    batch = stage.batch(np.array([0]), np.random.default_rng(3))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    at = (labels >= 0).nonzero().flatten()
    assert torch.equal(labels[at], ids[at + 1])
    answer = processor.tokenizer.convert_tokens_to_ids("<answer>")
    assert (ids[at] == answer).sum() == QUESTIONS
    assert (labels[at] == processor.tokenizer.eos_token_id).sum() == QUESTIONS


def test_both_steps_learn(tmp_path):
    vlm, processor = tiny.build(NAMES, words(), seed=0)
    spec = TrainSpec(steps=30, batch_size=8, learning_rate=3e-3, warmup_steps=5)
    for name, loss in (("align", "loss_cells"), ("instruct", "loss_answer")):
        stage = Stage(vlm, processor, make_scenes(), instruct=name == "instruct")
        fit(stage, spec, 0, tmp_path / name, Runtime(device="cpu", progress=False), name)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert rows[-1][loss] < 0.8 * rows[0][loss], name


def test_the_score_counts_exact_answers_only(vlm_and_processor, monkeypatch):
    """A model that always answers "left" is right where that is the answer, and nowhere else."""
    vlm, processor = vlm_and_processor
    left = processor.tokenizer.convert_tokens_to_ids("left")

    def generate(input_ids, **_):
        answer = torch.tensor([[left, processor.tokenizer.eos_token_id]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, answer], 1)

    monkeypatch.setattr(vlm, "generate", generate)
    scenes, splits = make_scenes(), {"cat": "val", "dog": "train", "red apple": "train", "ant": "hard"}
    rates = score(vlm, processor, scenes, 0, splits, per_scene=20)
    rng = np.random.default_rng(0)
    asked = [q for i in range(len(scenes)) for q in ask(scenes, i, 20, rng)]
    where = [q for q in asked if q.task == "where"]
    assert rates["where"]["n"] == len(where) == sum(rates[f"where/{s}"]["n"] for s in ("train", "val", "hard"))
    assert rates["where"]["right"] == sum(q.answer == "left" for q in where) > 0
    assert rates["what"]["right"] == rates["count"]["right"] == 0


def test_a_resumed_build_draws_what_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """Each step's own parameters are the same, whether the steps before it ran now or in an earlier start."""
    drawn = {}

    class Drawn(Stage):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.setdefault(len(starts), []).append(self.align.background.detach().clone())

    spec = TrainSpec(steps=1, batch_size=2)
    for name, value in {
        "ALIGN": spec,
        "INSTRUCT": spec,
        "SENTENCES": spec,
        "Stage": Drawn,
        "names": lambda: NAMES,
        "make_scenes": lambda *_: make_scenes(),
        "score_folder": lambda *_: {"where": {"estimate": 1.0, "low": 0.9, "high": 1.0, "n": 5}},
    }.items():
        monkeypatch.setattr(build, name, value)
    starts = []
    for _ in range(2):
        starts.append(1)
        torch.manual_seed(len(starts))  # another process
        build.build_vlm(tmp_path / "work", tmp_path / "vlm", Runtime(device="cpu", progress=False))
    assert len(drawn[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(drawn[1], drawn[2], strict=True))
    assert "| where | 100.0% |" in (tmp_path / "vlm" / "README.md").read_text()
    assert not list((tmp_path / "vlm").glob(".*.partial"))


def test_tokens_of_free_sentences_do_not_pile_up(vlm_and_processor):
    stage = Stage(*vlm_and_processor, make_scenes(), instruct=True)
    assert stage.tokens.cache_info().maxsize


def test_questions_become_conversations_about_their_scenes(tmp_path):
    scenes = make_scenes(4)
    write_conversations(scenes, tmp_path, 3, 5, free_share=0.5)
    talks = Conversations.open(tmp_path / NAME)
    assert len(talks) == 12
    for index in range(12):
        record, i = talks[index], index // 3
        assert np.array_equal(record.images[0], scenes.images[i])
        asked = ask(scenes, i, 3, np.random.default_rng((5, i)), 0.5)[index % 3]
        assert record.turns == (("user", asked.question), ("assistant", asked.answer))


def test_questions_name_no_emoji_but_those_asked_for(tmp_path):
    scenes = replace(make_scenes(40), names=(*NAMES, "bee", "fox"))
    scenes.cards[1, :3] = [2, -1, 3]  # none of them
    write_conversations(scenes, tmp_path, 20, 5, free_share=0.5, named={"cat", "dog", "bee"})
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert "images/000001.png" not in {row["image"] for row in rows}
    named = set()
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        named |= {name for name in scenes.names if name in f"{question} {answer}"}
        if "how many" in question or "count" in question:
            scene = int(row["id"].split("-")[0])
            assert NUMBERS.index(answer) == (scenes.cards[scene] >= 0).sum(), "a card without a name counts as well"
    assert named == {"cat", "dog", "bee"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    def write(folder):
        (folder / NAME).write_text("{}")

    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="own, which is something else"):
        make_folder(own, {"seed": 1}, write)
    assert (own / "thesis.txt").read_text() == "years of work"
    new = tmp_path / "new"
    assert make_folder(new, {"seed": 1}, write).read_text() == "{}"
    make_folder(new, {"seed": 1}, lambda _: pytest.fail("made twice"))
    with pytest.raises(UserError, match="new, which is something else"):
        make_folder(new, {"seed": 2}, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "own"]


def test_two_do_not_make_one_folder_at_a_time(tmp_path):
    def write(folder):
        (folder / NAME).write_text("{}")
        with pytest.raises(UserError, match="another process at work on this folder of questions"):
            make_folder(tmp_path / "a", {}, write)

    assert make_folder(tmp_path / "a", {}, write).is_file()
