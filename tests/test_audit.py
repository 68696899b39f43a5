"""Audits: what runs have in common, what must be declared, and sizes against measured ones."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

import tiny_families
from conftest import VAL
from full_size import CONFIGS, built
from test_processes import job  # noqa: F401 (a fixture)
from vlm4vla.audit import CHOICES, Audit, differences, require_declared, text
from vlm4vla.backbones import treatments
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import Backbone
from vlm4vla.cli import cli
from vlm4vla.errors import UserError
from vlm4vla.policy import VLA
from vlm4vla.reporting.html import report
from vlm4vla.spec import TREATMENTS, RunSpec, SourceSpec, TrainSpec
from vlm4vla.studies.matrix import Study, _leaves
from vlm4vla.training import examine

MEASURED = {  # samples at 448 px (PaliGemma 224), bf16, eager: pixels' shape, positions, picture's, GiB kept
    "Qwen/Qwen3-VL-2B-Instruct": ((784, 1536), 241, 196, 1.4),
    "Qwen/Qwen3-VL-4B-Instruct": ((784, 1536), 241, 196, 2.0),
    "Qwen/Qwen2.5-VL-3B-Instruct": ((1024, 1176), 301, 256, 3.3),
    "OpenGVLab/InternVL3_5-4B-HF": ((1, 3, 448, 448), 301, 256, 2.6),
    "google/paligemma-3b-pt-224": ((1, 3, 224, 224), 301, 256, 1.15),
}
BF16 = RunSpec(training=TrainSpec(precision="bf16"))


@pytest.mark.parametrize("name", MEASURED)
def test_activations_are_estimated_within_a_tenth_of_what_was_measured(name):
    shape, length, tokens, gib = MEASURED[name]
    pictures = {"pixel_values": torch.empty(shape, device="meta")}
    estimate = examine.activation_bytes(built(name), BF16, pictures, length, tokens) / examine.GIB
    assert estimate == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(("treatment", "mib"), [("full", 45.6), ("lora", 40.5)])
def test_activations_of_a_mixture_are_estimated_within_a_fifth_of_what_was_measured(treatment, mib):
    """Two of its layers at true width, 109 positions, bf16: what a second sample adds to the tensors that autograd
    keeps. Of 12 experts, for their number changes nothing."""
    values = CONFIGS["Qwen/Qwen3-VL-30B-A3B-Instruct"]
    text = values["text_config"] | {"num_hidden_layers": 2, "num_experts": 12}
    config = AutoConfig.for_model(values["kind"], text_config=text, vision_config=values["vision_config"])
    with torch.device("meta"):
        vlm = treatments.treat(AutoModelForImageTextToText.from_config(config), TREATMENTS[treatment])
    spec = BF16.model_copy(update={"treatment": treatment})
    pictures = {"pixel_values": torch.empty((0, 1536), device="meta")}
    estimate = examine.activation_bytes(vlm, spec, pictures, 109, 0) / 2**20
    assert estimate == pytest.approx(mib, rel=0.2)


def test_a_mixtures_work_is_that_of_the_experts_that_a_token_meets():
    pictures = {"pixel_values": torch.empty((784, 1536), device="meta")}
    work = examine.forward_flops(built("Qwen/Qwen3-VL-30B-A3B-Instruct"), pictures, 241, 196)
    assert work["llm"] == pytest.approx(2 * 241 * 3.0e9, rel=0.1), "3 B of 30 B parameters are active"
    gemma = Backbone(*tiny_families.draw("gemma4_moe")).vlm
    found = examine.forward_flops(gemma, {"pixel_values": torch.empty((1, 16, 768), device="meta")}, 10, 4)
    weights = treatments.groups(gemma)["llm"]
    assert found["llm"] < 2 * 10 * sum(p.numel() for p in weights.values()) / 1.5, "2 of 8 experts are met"


def test_flops_of_the_embedded_vlm_are_those_that_torch_counts(job):  # noqa: F811
    spec = job[0]
    found = examine.examine(spec, 96)
    vla = VLA(*load_vlm(spec.backbone), spec, 0)
    inputs = vla.backbone.encode(torch.zeros(1, 96, 96, 3, dtype=torch.uint8).numpy(), [examine.INSTRUCTION])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vla(inputs)
    assert found.sizes["forward_gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.1)


def test_what_is_frozen_takes_less_work():
    work = {"vision": 1.0, "projector": 0.1, "llm": 2.0}
    flops = {name: examine.training_flops(work, treatment) for name, treatment in TREATMENTS.items()}
    assert flops["full"] == flops["scratch"] == pytest.approx(3 * 3.1)
    assert flops["freeze_vision"] == pytest.approx(1 + 3 * 0.1 + 3 * 2)
    assert flops["freeze_llm"] == pytest.approx(3 * 1.1 + 2 * 2)
    assert flops["freeze_vlm"] == pytest.approx(1.1 + 2 * 2), "the query before the LLM is trained"
    assert flops["lora"] == pytest.approx(2 * 3.1)


def test_every_choice_is_audited_and_its_keys_are_keys_of_a_run(job):  # noqa: F811
    found = examine.examine(job[0], 96)
    assert found.choices.keys() == CHOICES.keys()
    assert {key for _, keys in CHOICES.values() for key in keys} <= set(_leaves(RunSpec))
    assert Audit.from_dict(found.to_dict()) == found
    assert found.choices["visual_tokens"] == "36"
    assert found.choices["parts"].startswith("vision trained, projector trained")
    assert found.sizes["trained"]["vision"] > 0 == found.sizes["frozen"]["vision"]
    assert "{instruction}" in found.choices["prompt"]


def test_mixtures_of_one_files_name_are_told_apart(job):  # noqa: F811
    told = set()
    for source in (
        {"conversations": "questions/conversations.jsonl"},
        {"conversations": "faces/conversations.jsonl"},
        {"conversations": "faces/conversations.jsonl", "images": "photographs"},
    ):
        data = job[0].data.model_copy(update={"mixture": (SourceSpec.model_validate(source),)})
        told.add(examine.examine(job[0].model_copy(update={"data": data}), 96).choices["mixture"])
    assert len(told) == 3


def audits(**others):
    choices = dict.fromkeys(CHOICES, "same")
    return {name: Audit(choices | values, {}) for name, values in {"a": {}, **others}.items()}


def test_differences_that_nobody_declared_stop_a_study():
    both = audits(b={"prompt": "other", "learning_rates": "1e-5"})
    assert differences(both) == {
        "prompt": {"same": ["a"], "other": ["b"]},
        "learning_rates": {"same": ["a"], "1e-5": ["b"]},
    }
    with pytest.raises(UserError, match=r"prompt: 'same' in a; 'other' in b(.|\n)*differs: \[learning_rates, prompt\]"):
        require_declared(both, (), ())
    with pytest.raises(UserError, match=r"differs: \[prompt\]"):
        require_declared(both, ["training.learning_rate"], ())
    require_declared(both, ["training.learning_rate"], ["prompt"])
    require_declared(audits(b={}), (), ())
    assert "prompt           same   [a]\n                 other   [b]" in text(both)


def test_a_study_declares_choices_that_there_are():
    with pytest.raises(UserError, match=r"no choice promt \(nearest: prompt"):
        Study(name="x", differs=("promt",)).cells()


def test_the_demos_cells_differ_in_what_the_demo_varies():
    done = CliRunner().invoke(cli, ["audit", "demo"], catch_exceptions=False)
    assert "not the same in all 3: parts" in done.stderr
    assert "[full]" in done.stdout


def test_a_report_shows_how_its_runs_differ(study_folder):
    folder = study_folder({"full": {VAL: (1.0, 1.0)}, "scratch": {VAL: (1.0, 0.3)}}, seeds=(0,), episodes=5)
    for path, audit in zip(
        sorted(folder.glob("runs/*/policy/policy.json")), audits(b={"head": "wider"}).values(), strict=True
    ):
        values = json.loads(path.read_text())
        values["card"]["audit"] = audit.to_dict()
        path.write_text(json.dumps(values))
    page = report(folder, folder / "report.html").read_text()
    assert "As executed" in page
    assert "same <small>full</small><br>wider <small>scratch</small>" in page


def test_a_dry_run_says_what_it_would_take_and_trains_nothing(job, tmp_path):  # noqa: F811
    spec, demos = job
    sets = ["--set", f"backbone={spec.backbone}", "--set", "treatment=freeze_vision", "--data", str(demos)]
    arguments = ["train", *sets, "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert any(line.startswith("vision ") and line.endswith(" frozen") for line in done.stdout.splitlines())
    for line in ("1,000 of 64 samples", "100.0% of the samples, 4000.0 times its 16", "GiB", "measured matrix rate"):
        assert line in done.stdout
    assert not (tmp_path / "out").exists()
