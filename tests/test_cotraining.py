"""Robot sets and conversations in one training: what is drawn, the language loss, resuming, several processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")

import tiny_families
from fake_sim import CONVENTION
from test_families import each as every
from test_imitation import QUIET, demonstrations
from test_processes import STEPS, assert_same, run, together
from vlm4vla.arguments import trained_on
from vlm4vla.backbones import tiny
from vlm4vla.backbones.families import FAMILIES, family
from vlm4vla.backbones.inputs import Inputs
from vlm4vla.backbones.vlm import Backbone, save_vlm
from vlm4vla.cli import cli
from vlm4vla.convention import LIBERO
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.sources import Sources
from vlm4vla.data.vqa import Conversations
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics
from vlm4vla.policy import untrained
from vlm4vla.skills.questions import words
from vlm4vla.spec import DataSpec, HeadSpec, RunSpec, Runtime, SourceSpec, TrainSpec, parse
from vlm4vla.studies.runner import data_folder
from vlm4vla.training import check, imitation
from vlm4vla.training.examine import LOGITS_BYTES, answers_bytes, on_meta
from vlm4vla.training.forecast import forecast, gib_needed
from vlm4vla.training.imitation import Imitation, train
from vlm4vla.training.loop import make_batch

SIZE = 96
TALK = (("user", "where is the cat"), ("assistant", "left"))
TURNS = (*TALK, ("user", "find the cat"), ("assistant", "on the left"))


def talks(folder, number=6, turns=TALK, size=SIZE):
    """A file of conversations about pictures of noise."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
        said = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": said}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return str(folder / "talks.jsonl")


# ------------------------------------------------------------------------------------------------------- language loss


def plainly(name, vlm, processor, image, question, answer):
    """The loss that plain transformers has of one record: its own processor, its own forward with labels."""
    if name.startswith("paligemma"):
        made = processor(text=f"<image>{question}", images=[[image]], suffix=answer, return_tensors="pt")
        return vlm(**made).loss
    system = family(vlm.config).system
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    bos = processor.tokenizer.bos_token
    text_options = {"add_special_tokens": not (bos and prompt.startswith(bos))}
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    options = {"text_kwargs": text_options, "images_kwargs": dict(FAMILIES[vlm.config.model_type].images)}
    made = processor(text=[prompt + answer], images=[[image]], return_tensors="pt", **options)
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -len(ids) :] = torch.tensor(ids)
    return vlm(**made, labels=labels).loss


ENDS = {
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "internvl": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "llava": "</s>",
    "glm4v": "<|user|>",
    "mistral3": "</s>",
    "paligemma1": "",  # its processor adds the end
    "paligemma2": "",
    "llava_onevision": "<|im_end|>",
    "molmo2": "<|im_end|>",
    "qwen3_5": "<|im_end|>",
    "qwen3_vl_moe": "<|im_end|>",
}
FAST = {"qwen2_5_vl", "paligemma1", "smolvlm", "gemma3", "internvl", "llava"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in ENDS])
def test_the_language_loss_is_the_plain_models_own(name):
    vlm, processor = tiny_families.draw(name)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    talk = [(("user", "is it a cat?"), ("assistant", "no, a dog")), (("user", "what?"), ("assistant", "an ant"))]
    backbone = Backbone(vlm, processor)
    inputs = backbone.encode_answers(images, talk)
    numbers = (inputs["labels"] >= 0).sum(1)
    with torch.no_grad():
        found = backbone.answer_losses(inputs) / numbers
        expected = [
            plainly(name, vlm, processor, image, question, answer + ENDS[name])
            for image, ((_, question), (_, answer)) in zip(images, talk, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [case for case in every(fast=FAST | {"minicpmv4_6"}) if "kosmos2" not in case.values])
def test_logits_are_made_of_answers_alone_and_a_dry_run_counts_them(name):
    spec, turns = RunSpec(), [TALK, TURNS]
    vla = untrained(*tiny_families.draw(name), spec)
    made = []
    vla.backbone.vlm.get_output_embeddings().register_forward_hook(lambda _module, _args, out: made.append(out.numel()))
    with torch.no_grad():
        vla.backbone.answer_losses(vla.backbone.encode_answers(np.zeros((2, 64, 64, 3), np.uint8), turns))
    _, counted = answers_bytes(vla, spec, 64, turns)
    assert [number * LOGITS_BYTES for number in made] == [counted]


def said(backbone, turns):
    """What is trained of a conversation, and all of it, as text."""
    inputs = backbone.inputs.answers([turns], SIZE, SIZE)
    decode = backbone.processor.tokenizer.decode
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    return decode(ids[labels >= 0]), decode(ids)


def test_every_turns_answer_is_learned_and_nothing_else():
    backbone = Backbone(*tiny_families.draw("qwen2_5_vl"))
    answers, text = said(backbone, (("system", "Be brief."), *TURNS))
    assert answers == "left<|im_end|>on the left<|im_end|>"
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    ending = "where is the cat<|im_end|>\n<|im_start|>assistant\nleft<|im_end|>\n"
    ending += "<|im_start|>user\nfind the cat<|im_end|>\n<|im_start|>assistant\non the left<|im_end|>"
    assert text.endswith(ending)


def test_the_embedded_vlm_is_asked_as_it_was_taught():
    backbone = Backbone(*tiny.build(["cat"], words(), 0))
    answers, text = said(backbone, TALK)
    assert answers == "left <eos>"
    assert text == f"<bos> {'<image> ' * 36}where is the cat <answer> left <eos>"


def test_conversations_that_a_model_cannot_be_given_are_refused():
    plain = Backbone(*tiny_families.draw("paligemma1"))
    with pytest.raises(UserError, match="a question and its answer: PaliGemma"):
        plain.inputs.require_talk(TURNS)
    with pytest.raises(UserError, match="special token '<eos>'"):
        plain.inputs.require_talk((TALK[0], ("assistant", "a<eos>")))
    headless = Backbone(*tiny_families.draw("kosmos2"))
    with pytest.raises(UserError, match="Kosmos-2, which is opened without its LM head"):
        headless.require_words()


# ------------------------------------------------------------------------------------------------------------- sources


def test_several_sets_are_one(tmp_path):
    folders = [str(demonstrations(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    data = DataSpec(folder=folders[0], mixture=(SourceSpec(folder=folders[1], weight=3),))
    sources = Sources.open(data, folders[0])
    sets = [Dataset.open(folder) for folder in folders]
    assert sources.names == ("demonstrations", "b")
    assert (sources.num_frames, sources.num_episodes, sources.shares) == (32, 4, [0.25, 0.75])
    assert sources.episode_to.tolist() == [8, 16, 24, 32]
    frames = np.array([31, 0, 16, 15])
    assert sources.source(frames).tolist() == [1, 0, 1, 0]
    own = [sets[1], sets[0], sets[1], sets[0]]
    for cached in (True, False):
        pictures = sources.pictures(SIZE, cached)(frames)
        for picture, each, i in zip(pictures, own, [15, 0, 0, 15], strict=True):
            assert np.array_equal(picture, each.images(np.array([i]))[0])
    assert np.array_equal(sources.actions[16:], sets[1].actions)
    assert sources.frame_weights == pytest.approx(np.repeat([1 / 16, 3 / 16], 16))


def test_no_two_sources_have_one_name(tmp_path):
    folder = demonstrations(tmp_path / "x.v1")
    mixture = [SourceSpec(folder=str(demonstrations(tmp_path / name / "x.v2"))) for name in "abc"]
    for name in ("x.v2-2", "demonstrations", "put (50%), süß"):
        mixture.append(SourceSpec(folder=str(demonstrations(tmp_path / name))))
    mixture.append(SourceSpec(folder=str(folder / "meta" / "..")))
    (tmp_path / "bridge").symlink_to(folder)
    mixture.append(SourceSpec(folder=str(tmp_path / "bridge")))
    names = Sources.open(DataSpec(folder="x", mixture=tuple(mixture)), folder).names
    numbered = ("demonstrations", "x.v2", "x.v2-2", "x.v2-3", "x.v2-2-2", "demonstrations-2")
    assert names == (*numbered, "put-50-s-", "x.v1", "bridge")


def test_a_set_alone_is_itself(tmp_path):
    folder = demonstrations(tmp_path / "a")
    sources, dataset = Sources.open(DataSpec(folder=str(folder)), folder), Dataset.open(folder)
    assert (sources.content_hash, sources.frame_weights) == (dataset.content_hash, None)


def test_what_all_sources_hold_identifies_them(tmp_path):
    folder, path = demonstrations(tmp_path / "a"), talks(tmp_path / "talks")

    def opened(weight=1.0):
        return Sources.open(DataSpec(folder="x", mixture=(SourceSpec(conversations=path, weight=weight),)), folder)

    first = opened().content_hash
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "talks" / "3.png")  # black: a smaller file
    assert opened().content_hash != first, "another picture"
    assert opened(2.0).content_hash != opened().content_hash, "another share"
    assert opened().content_hash == opened().content_hash


def test_sets_that_mean_different_things_are_refused_by_name(tmp_path):
    first, small = demonstrations(tmp_path / "a"), tmp_path / "small"
    episode = Episode.encode({"main": np.zeros((4, 64, 64, 3), np.uint8)}, np.zeros((4, 7), np.float32), None, "push")
    write(small, [episode], CONVENTION, {})
    write(tmp_path / "libero", [episode], LIBERO, {})

    def opened(other, **data):
        return Sources.open(DataSpec(folder="x", mixture=(SourceSpec(folder=str(other)),), **data), first)

    with pytest.raises(UserError, match=rf"control_hz: {first} has .*, {tmp_path}/libero has 20.0"):
        opened(tmp_path / "libero", image_size=96)
    with pytest.raises(UserError, match=rf"{first} with pictures of \(96, 96\), {small} of \(64, 64\)"):
        opened(small)
    assert opened(small, image_size=64).pictures(64, False)(np.array([0, 17])).shape == (2, 64, 64, 3)


def test_a_record_with_no_picture_or_several_is_refused_before_training(tmp_path):
    path = talks(tmp_path / "talks")
    with open(path, "a") as file:
        file.write('\n{"images": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "a"}, ')
        file.write('{"from": "gpt", "value": "left"}]}')
    data = DataSpec(folder="x", mixture=(SourceSpec(conversations=path),))
    sources = Sources.open(data, demonstrations(tmp_path / "a"))
    backbone = Backbone(*tiny.build(["cat"], words(), 0))
    with pytest.raises(UserError, match="record 6 with 2 pictures"):
        check.material(RunSpec(data=data), sources, backbone, one_shape=False)
    talks(tmp_path / "one")
    Path(path).write_text((tmp_path / "one" / "talks.jsonl").read_text())
    (tmp_path / "talks" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        check.material(RunSpec(data=data), Sources.open(data, tmp_path / "a"), backbone, one_shape=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"mixture": [{"weight": 1}]}}, "by folder or by conversations"),
        ({"data": {"mixture": [{"folder": "a", "images": "b"}]}}, "images given"),
        ({"data": {"mixture": [{"folder": "a", "weight": float("inf")}]}}, "weight: .*finite"),
        (
            {"data": {"mixture": [{"folder": "a", "wieght": 1}]}},
            r"mixture.0.wieght: unknown key \(nearest: weight",
        ),
        ({"training": {"language_weight": 2}}, "no conversations in data.mixture"),
        ({"treatment": "freeze_vlm", "data": {"mixture": [{"conversations": "a"}]}}, "trains nothing of the VLM"),
    ],
)
def test_impossible_mixtures_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        parse(RunSpec, values, "run.yaml")


def test_without_a_mixture_a_run_is_called_what_it_was():
    assert "mixture" not in RunSpec().model_dump()["data"]
    assert "language_weight" not in RunSpec().model_dump()["training"]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Three samples of four are frames of two sets: of the parts of a batch many hold no conversation."""
    folder = tmp_path_factory.mktemp("job")
    save_vlm(*tiny.build(["cat"], words(), 0), folder / "vlm")
    mixture = (
        SourceSpec(folder=str(demonstrations(folder / "more", seed=1)), weight=0.5),
        SourceSpec(conversations=talks(folder / "talks"), weight=0.5),
    )
    training = TrainSpec(steps=STEPS, batch_size=4, warmup_steps=0, language_weight=0.5)
    data = DataSpec(folder="x", mixture=mixture)
    spec = RunSpec(backbone=str(folder / "vlm"), data=data, training=training, head=HeadSpec(hidden=16))
    return spec, demonstrations(folder / "demos")


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run(job, out)
    return out


def test_shares_and_losses_of_every_source_are_told(job, alone):
    rows = read_metrics(alone / "metrics.jsonl")
    for row in rows:
        shares = {name: row[f"share/{name}"] for name in ("demonstrations", "more", "talks")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        for name, share in shares.items():
            assert (f"loss/{name}" in row) == (share > 0), "no loss of what a batch does not hold"
        if "loss/talks" in row:
            assert row["loss/talks"] == row["loss_language"]
        action = row["loss_pose"] + 0.01 * row["loss_gripper"]
        assert row["loss"] == pytest.approx(action + 0.5 * row.get("loss_language", 0), abs=1e-5)
    assert np.mean([row["share/demonstrations"] for row in rows]) == pytest.approx(0.5, abs=0.15)
    card = json.loads((alone / "policy" / "policy.json").read_text())["card"]
    assert [(s["name"], s["samples"], s["share"]) for s in card["sources"]] == [
        ("demonstrations", 16, 0.5),
        ("more", 16, 0.25),
        ("talks", 6, 0.25),
    ]
    path = job[0].data.mixture[1].conversations
    assert card["audit"]["choices"]["mixture"].endswith(f", 0.5 of {path}; language weight 0.5")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((("user", "<eos> where"), ("assistant", "left")), "special token '<eos>'"),
        ((("user", "where"), ("assistant", "in Kreuzberg")), "'in Kreuzberg' with words"),
    ],
)
def test_what_the_vlm_cannot_be_given_is_told_before_the_first_step(job, tmp_path, turns, message):
    spec, demos = job
    path = talks(tmp_path / "talks")
    with open(path, "a") as file, open(talks(tmp_path / "bad", 1, turns)) as bad:
        file.write("\n" + bad.read().replace("0.png", "1.png"))
    data = DataSpec(folder="x", mixture=(SourceSpec(conversations=path, weight=0.1),))
    with pytest.raises(UserError, match=rf"{path}, record 6: .*{message}"):
        train(spec.model_copy(update={"data": data}), demos, tmp_path / "out", QUIET)
    assert not list((tmp_path / "out").glob("metrics*"))


def test_what_training_refuses_a_dry_run_refuses_as_well(job, tmp_path, monkeypatch):
    spec, demos = job
    save_vlm(*tiny_families.draw("kosmos2"), tmp_path / "headless")
    monkeypatch.setattr(check, "get_available_trackers", list)
    small = spec.data.model_copy(update={"mixture": (SourceSpec(folder=str(demos), weight=1e-6),)})
    modes = spec.head.model_copy(update={"normalize": ("quantile", "none")})
    pictures = {"main": np.zeros((4, SIZE, SIZE, 3), np.uint8)}
    write(tmp_path / "told", [Episode.encode(pictures, np.zeros((4, 7), np.float32), None, "a<eos>")], CONVENTION, {})
    for changes, how, message, folder in (
        ({}, {"compile": True}, "--compile with conversations", demos),
        ({}, {"compile": True, "shard": True}, "--compile with --shard", demos),
        ({}, {"accumulate": 3}, "a batch of 4 for 1 processes x 3 parts", demos),
        ({}, {"trackers": ("wandb",)}, "no tracker wandb installed", demos),
        ({}, {"device": "cuda:9"}, "no device 'cuda:9'", demos),
        ({"data": small}, {}, "at least one sample in 64 batches", demos),
        ({"backbone": str(tmp_path / "headless")}, {}, "opened without its LM head", demos),
        ({"proprioception": True}, {}, "without observation.state", demos),
        ({"head": modes}, {}, "the modes", demos),
        ({}, {}, "special token '<eos>'", tmp_path / "told"),
    ):
        changed = spec.model_copy(update=changes)
        with pytest.raises(UserError, match=message):
            run((changed, folder), tmp_path / "out", **how)
        sources, runtime = Sources.open(changed.data, folder), Runtime(**{"device": "cpu", **how})
        with pytest.raises(UserError, match=message):
            forecast(changed, runtime, SIZE, 1, sources)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_looks_at_the_demonstrations_as_training_does(tmp_path):
    """The run's own data section, which says 96 pixels, is of others."""
    episodes = [Episode.encode({"main": np.zeros((4, 32, 48, 3), np.uint8)}, np.zeros((4, 7), np.float32), None, "go")]
    write(tmp_path / "demos", episodes, CONVENTION, {})
    arguments = ["train", "--data", str(tmp_path / "demos"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(cli, [*arguments, *more])
        assert isinstance(done.exception, UserError)
        assert "pictures of 32 x 48" in str(done.exception)


def test_a_dry_run_counts_the_logits_of_answers(job, tmp_path):
    spec, demos = job
    vla, _ = on_meta(spec)
    both = [TALK, (TALK[0], ("assistant", "on the left"))]
    vocabulary = vla.backbone.vlm.config.get_text_config().vocab_size
    more, logits = answers_bytes(vla, spec, SIZE, both)
    assert logits == 2 * len(("on", "the", "left", "<eos>")) * vocabulary * LOGITS_BYTES
    _, none = answers_bytes(vla, spec, SIZE, [TALK])
    assert none == len(("left", "<eos>")) * vocabulary * LOGITS_BYTES
    assert more == 2 * answers_bytes(vla, spec, SIZE, both[1:])[0]

    def activations(answer):
        path = talks(tmp_path / f"{len(answer)}", turns=(TALK[0], ("assistant", answer)))
        data = DataSpec(folder="x", mixture=(SourceSpec(conversations=path),))
        changed = spec.model_copy(update={"data": data})
        sources = Sources.open(data, demos)
        material = check.material(changed, sources, vla.backbone, one_shape=False)
        sizes = {"states_gib": 0, "activations_gib": 0}
        return gib_needed(vla, sizes, changed, Runtime(), 1, sources, material)[1] * 4 * 2**30

    short, long = activations("left"), activations("left left left left")
    more = [sum(answers_bytes(vla, spec, SIZE, [(TALK[0], ("assistant", a))])) for a in ("left", "left left left left")]
    each = more[1] - more[0]
    assert long - short == pytest.approx(2 * each), "of two sources of one weight, each batch of four has two samples"


def test_records_are_read_once_before_the_first_step_and_each_is_tokenised_once(job, tmp_path, monkeypatch):
    """Six records, of which 16 samples are drawn."""
    spec, demos = job
    training = spec.training.model_copy(update={"steps": 16})
    read, asked, written = [], [], []

    def counted(cls, name, calls):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, key, *rest: (calls.append(key), original(self, key, *rest))[1])

    counted(Conversations, "_record", read)
    counted(Inputs, "require_talk", asked)
    counted(Inputs, "script", written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imitation, "fit", lambda *_: None)
        train(spec, demos, tmp_path / "none", QUIET)
    assert read == list(range(6))
    assert (len(asked), len(written)) == (6, 0)
    read.clear()
    train(spec.model_copy(update={"training": training}), demos, tmp_path / "out", QUIET)
    assert len(asked) == 12
    assert len(written) == 1, "all six say the same"
    assert len(read) == 6 + 16, "and each sample drawn"


def test_killed_it_goes_on_at_the_exact_sample(job, alone, tmp_path):
    assert together(1, lambda: run(job, tmp_path, stop=2)) == [9]
    assert list(tmp_path.glob("checkpoint*"))
    run(job, tmp_path)
    for file in ("action.safetensors", "vlm/model.safetensors"):
        first, second = (load_file(out / "policy" / file) for out in (alone, tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_in_parts_is_the_same_batch(job, alone, tmp_path):
    run(job, tmp_path, accumulate=4)
    assert_same(alone, tmp_path)


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(job, alone, tmp_path, shard):
    assert together(2, lambda: run(job, tmp_path, shard=shard)) == [0, 0]
    assert_same(alone, tmp_path)


@pytest.mark.slow
def test_both_losses_fall_and_adapters_are_enough(job, tmp_path):
    spec, demos = job
    training = TrainSpec(steps=30, batch_size=4, warmup_steps=0, learning_rate=3e-3)
    train(spec.model_copy(update={"treatment": "lora", "training": training}), demos, tmp_path, QUIET)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["loss_language"] < 0.5 * rows[0]["loss_language"]
    assert rows[-1]["loss_pose"] < rows[0]["loss_pose"]


def test_another_mixture_is_another_run(job, alone):
    spec, demos = job
    other = spec.model_copy(update={"data": spec.data.model_copy(update={"mixture": spec.data.mixture[1:]})})
    with pytest.raises(UserError, match="belongs to the run"):
        train(other, demos, alone, QUIET)


def test_frames_are_drawn_for_each_part_as_for_the_whole(job):
    """Augmentation of a frame does not depend on the part of the batch that it is in."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imitation, "fit", lambda objective, *_: made.append(objective))
        train(*job, job[1].parent / "none", QUIET)
    (objective,) = made
    assert isinstance(objective, Imitation)
    whole = make_batch(objective, job[0].training, 0, 1)
    parts = [make_batch(objective, job[0].training, 0, 1, part, 4) for part in range(4)]
    for name in ("augment.factor", "target", "inputs.images"):
        there = [part[name][part["valid"].any(1)] for part in parts]
        assert torch.equal(torch.cat(there), whole[name])


# -------------------------------------------------------------------------------------------------- studies, arguments


def test_a_study_records_once_for_cells_that_differ_in_what_is_beside(tmp_path):
    beside = (SourceSpec(conversations="talks.jsonl"),)
    alone, mixed = DataSpec(seed=1), DataSpec(seed=1, mixture=beside)
    assert data_folder(alone, tmp_path) == data_folder(mixed, tmp_path) != data_folder(DataSpec(seed=2), tmp_path)
    assert RunSpec(data=alone).run_id != RunSpec(data=mixed).run_id


def test_other_demonstrations_leave_what_is_beside_them(tmp_path):
    demos = demonstrations(tmp_path / "demos")
    spec = RunSpec(data=DataSpec(mixture=(SourceSpec(folder="more"),)))
    true, _ = trained_on(spec, demos)
    assert true.data == DataSpec(folder=str(demos), mixture=spec.data.mixture)
