"""Treatments: frozen stays to the bit, trained moves, adapters are kept as such, parameters as many as published."""

import json
import shlex

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForImageTextToText

import tiny_families
from fake_sim import CONVENTION
from full_size import CONFIGS, built, on_meta
from vlm4vla import hub
from vlm4vla.arguments import run_spec
from vlm4vla.backbones import adapters, tiny, treatments
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import Backbone, parameters_hash, save_vlm
from vlm4vla.cli import cli
from vlm4vla.data.normalize import Normalizer
from vlm4vla.errors import UserError
from vlm4vla.policy import VLA, Policy
from vlm4vla.serving.sources import opened
from vlm4vla.skills.questions import words
from vlm4vla.spec import TREATMENTS, VLM_GROUPS, GroupSpec, RunSpec, TrainSpec, TreatmentSpec, parse
from vlm4vla.types import Observation

NAMES = ["cat", "ant"]
TEXTS = ["place the block on cat", "place it on ant"]
COMPOSED = {
    "name": "mixed",
    "vision": "scratch",
    "llm": {"mode": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
    "word_embedding": "frozen",
}
ALL = [*TREATMENTS, COMPOSED]


def spec_of(treatment, **values):
    return parse(RunSpec, {"treatment": treatment, "head": {"hidden": 32}, **values}, "here")


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm")
    save_vlm(*tiny.build(NAMES, words(), seed=0), path)
    return path


def train(backbone, images, steps=2):
    """The query is zero at first: words reach it, and adapters' first matrices get a gradient, from the second step."""
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        backbone(backbone.encode(images, TEXTS)).square().sum().backward()
        optimizer.step()


def test_what_hears_is_a_group_of_its_own_and_never_trained():
    _, config = tiny_families.FAMILIES["gemma4"]()
    config.audio_config = AutoConfig.for_model("gemma4_audio")
    with torch.device("meta"):
        vlm = treatments.treat(AutoModelForImageTextToText.from_config(config), spec_of("full").treated)
    parts = treatments.groups(vlm)
    assert len(parts["projector"]) == 1
    assert {name.split(".")[1] for name in parts["audio"]} == {"audio_tower", "embed_audio"}
    assert not any(parameter.requires_grad for parameter in parts["audio"].values())


@pytest.mark.parametrize("treatment", ALL, ids=lambda t: t if isinstance(t, str) else t["name"])
def test_frozen_stays_to_the_bit_and_trained_moves(treatment, images):
    treated = spec_of(treatment).treated
    torch.manual_seed(3)
    original, processor = tiny.build(NAMES, words(), seed=0)
    vlm = treatments.treat(original, treated)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    train(Backbone(vlm, processor), images)
    for group, parameters in treatments.groups(vlm).items():
        mode = treated.groups()[group].mode if group in VLM_GROUPS else "frozen"
        moved = {name for name, p in parameters.items() if not torch.equal(before[name], p)}
        low_rank = {name for name in parameters if adapters.is_adapter(name)}
        if mode in ("trained", "scratch"):
            assert moved
        else:
            assert moved == low_rank, (group, mode)
        assert bool(low_rank) == (mode == "lora")
    trained = {group: counts["trained"] for group, counts in treatments.count(vlm).items()}
    assert sum(trained.values()) == sum(p.numel() for p in vlm.parameters() if p.requires_grad)


def test_what_is_drawn_anew_is_another_draw_and_the_rest_is_kept():
    def weights(treatment):
        vlm, _ = tiny.build(NAMES, words(), seed=0)
        torch.manual_seed(7)
        treated = treatments.treat(vlm, TREATMENTS[treatment])
        return {
            group: {name: p.detach().clone() for name, p in parameters.items() if p.ndim > 1}
            for group, parameters in treatments.groups(treated).items()
        }

    kept, drawn, eyes = weights("full"), weights("scratch"), weights("scratch_vision")
    for group in kept:
        for name in kept[group]:
            assert not torch.equal(kept[group][name], drawn[group][name])
            assert torch.equal(eyes[group][name], (drawn if group == "vision" else kept)[group][name])


def test_adapters_change_nothing_before_training(images):
    vlm, processor = tiny.build(NAMES, words(), seed=0)
    plain = Backbone(vlm, processor)
    torch.nn.init.normal_(plain.query)
    before = plain(plain.encode(images, TEXTS))
    treatments.treat(vlm, TREATMENTS["lora"])
    assert torch.equal(plain(plain.encode(images, TEXTS)), before)


def trained_on(folder, spec, images):
    """A policy of ``spec`` on the VLM in ``folder``, after two steps."""
    torch.manual_seed(1)
    vlm, processor = load_vlm(str(folder))
    card = {"backbone_hash": parameters_hash(vlm)}
    vla = VLA(treatments.treat(vlm, spec.treated), processor, spec, 0)
    train(vla.backbone, images)
    actions = Normalizer.fit(np.tile(np.eye(7, dtype=np.float32), (8, 1)))
    return Policy(vla, spec, CONVENTION, actions, None, 96, card)


def test_a_policy_with_adapters_keeps_them_as_adapters_and_acts_the_same_when_opened(folder, images, tmp_path):
    policy = trained_on(folder, spec_of(COMPOSED, backbone=str(folder)), images)
    policy.save(tmp_path)
    look = Observation({"main": images[0]}, TEXTS[0])
    chunk = policy.predict([look])[0].actions
    assert np.array_equal(Policy.load(tmp_path).predict([look])[0].actions, chunk)
    assert not (tmp_path / "vlm").exists(), "the VLM is kept where it is"


def test_adapters_of_a_packed_vision_tower_are_merged():
    """Its configuration names an attention of ours, from which transformers makes no new model."""
    torch.manual_seed(0)
    vlm, processor = tiny_families.draw("qwen3_vl")
    names = set(vlm.state_dict())
    backbone = Backbone(treatments.treat(vlm, TREATMENTS["lora"]), processor)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            parameter.normal_(0, 0.1) if adapters.is_adapter(name) else None
    inputs = backbone.encode(np.full((2, 64, 64, 3), 100, np.uint8), TEXTS)
    hidden = backbone(inputs)
    adapters.merge(vlm)
    assert set(vlm.state_dict()) == names
    torch.testing.assert_close(backbone(inputs), hidden, atol=1e-5, rtol=1e-5)


MIXTURES = ["qwen3_vl_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_5_moe", "gemma4_moe"))]


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_reach_the_experts_of_a_mixture(name, tmp_path):
    """Only they are trained; saved, they are opened by us to the last bit and by plain peft, and can be merged."""
    torch.manual_seed(0)
    save_vlm(*tiny_families.draw(name), tmp_path / "vlm")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    spec = spec_of(
        {"name": "experts", "llm": {"mode": "lora", "rank": 3}, "vision": "frozen", "word_embedding": "frozen"}
    )
    vlm, processor = load_vlm(str(tmp_path / "vlm"))
    names = set(vlm.state_dict())
    plain = Backbone(vlm, processor)
    torch.nn.init.normal_(plain.query)
    inputs = plain.encode(images, TEXTS)
    untrained = plain(inputs)
    backbone = Backbone(treatments.treat(vlm, spec.treated), processor)
    backbone.query.data = plain.query.data
    assert torch.equal(backbone(inputs), untrained)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    train(backbone, images, 3)
    llm = treatments.groups(vlm)["llm"]
    moved = {name for name, p in llm.items() if not torch.equal(before[name], p)}
    assert moved == {name for name in llm if adapters.is_adapter(name)}
    experts = [name for name in moved if ".experts." in name]
    assert len(experts) == 4 * sum(name.endswith("experts.base_layer.base_layer.down_proj") for name in llm) > 0
    hidden = backbone(inputs)

    adapters.save(vlm, vlm.state_dict(), tmp_path / "adapter")
    projector = treatments.groups(vlm)["projector"]

    def opened_with(how):
        other, _ = load_vlm(str(tmp_path / "vlm"))
        other.load_state_dict(projector, strict=False)
        again = Backbone(how(other), processor)
        again.query.data = backbone.query.data
        return again.eval()(inputs)

    def ours(other):
        adapters.load(other, tmp_path / "adapter")
        return other

    backbone.eval()
    assert torch.equal(opened_with(ours), hidden)
    theirs = opened_with(lambda other: peft.PeftModel.from_pretrained(other, tmp_path / "adapter").model)
    torch.testing.assert_close(theirs, hidden, atol=1e-5, rtol=1e-5)
    adapters.merge(vlm)
    assert set(vlm.state_dict()) == names
    torch.testing.assert_close(backbone(inputs), hidden, atol=1e-5, rtol=1e-5)


def test_adapters_on_another_machine_are_told_where_their_vlm_is(folder, images, tmp_path, monkeypatch):
    """Where it was in training there is nothing; other weights are refused; a merged policy needs it no more."""
    policy = trained_on(folder, spec_of("lora", backbone=str(tmp_path / "vlm")), images)
    (tmp_path / "policy").mkdir()
    policy.save(tmp_path / "policy")

    def merge(*options):
        arguments = ["policy", "merge", str(tmp_path / "policy"), "--out", str(tmp_path / "whole"), *options]
        return CliRunner().invoke(cli, arguments).exception

    error = merge()
    assert isinstance(error, UserError)
    assert f"policy merge {tmp_path / 'policy'} --backbone NAME --out FOLDER" in error.next_step
    assert "hf download" not in error.next_step, "it was a folder"
    save_vlm(*tiny.build(NAMES, words(), seed=9), tmp_path / "other")
    assert "other weights in the backbone" in str(merge("--backbone", str(tmp_path / "other")))
    look = Observation({"main": images[0]}, TEXTS[0])
    with opened(str(tmp_path / "policy"), "cpu", backbone=str(folder)) as source:
        here = source.policy.predict([look])[0].actions
    np.testing.assert_allclose(here, policy.predict([look])[0].actions, atol=1e-5)
    assert merge("--backbone", str(folder)) is None
    merged = Policy.load(tmp_path / "whole").predict([look])[0].actions
    np.testing.assert_allclose(merged, policy.predict([look])[0].actions, atol=1e-5)
    with pytest.raises(UserError, match="which has its own"):
        Policy.load(tmp_path / "whole", backbone=str(folder))
    place = str(tmp_path / "policy")
    for arguments in (
        ["eval", place, "--protocol", "grinningface/place/val/v1", "--device", "cpu"],
        ["serve", place, "--device", "cpu"],
        ["policy", "push", place, "owner/name"],
    ):
        assert "--backbone NAME" in CliRunner().invoke(cli, arguments).exception.next_step
        error = CliRunner().invoke(cli, [*arguments, "--backbone", str(tmp_path / "other")]).exception
        assert "other weights in the backbone" in error.found
    pushed = []
    monkeypatch.setattr(hub, "push", lambda *told: pushed.append(told))
    done = CliRunner().invoke(cli, ["policy", "push", place, "owner/name", "--backbone", str(folder)])
    assert done.exit_code == 0, done.exception
    assert pushed == [(tmp_path / "policy", "owner/name", False)]
    for other in ("openpi://127.0.0.1:1", "random:data"):
        with pytest.raises(UserError, match="--backbone with"), opened(other, backbone=str(folder)):
            pass
    arguments = ["policy", "merge", str(tmp_path / "whole"), "--out", str(tmp_path / "again")]
    assert "no adapters to merge" in str(CliRunner().invoke(cli, arguments).exception)
    assert not (tmp_path / "again").exists()


def test_plain_peft_opens_the_adapters(folder, images, tmp_path):
    vlm, processor = load_vlm(str(folder))
    torch.manual_seed(1)
    ours = Backbone(treatments.treat(vlm, TREATMENTS["lora"]), processor)
    train(ours, images)
    ours.eval()
    adapters.save(vlm, vlm.state_dict(), tmp_path / "adapter")
    assert str(folder) not in (tmp_path / "adapter" / "adapter_config.json").read_text(), "it may be pushed"
    theirs = Backbone(peft.PeftModel.from_pretrained(load_vlm(str(folder))[0], tmp_path / "adapter").model, processor)
    theirs.query.data = ours.query.data
    inputs = ours.encode(images, TEXTS)
    assert torch.equal(theirs.eval()(inputs), ours(inputs))


@pytest.mark.parametrize(
    ("name", "said"), [("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"), ("/home/me/vlm", None), ("", None)]
)
def test_adapters_name_their_vlm_where_others_can_find_it(name, said, tmp_path):
    vlm = treatments.treat(tiny.build(NAMES, words(), seed=0)[0], TREATMENTS["lora"])
    vlm.name_or_path = name
    adapters.save(vlm, vlm.state_dict(), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == said


def test_ranks_and_targets_are_the_groups_own():
    vlm, _ = tiny.build(NAMES, words(), seed=0)
    values = {"vision": {"mode": "lora", "rank": 2}, "llm": {"mode": "lora", "rank": 3, "targets": ["q_proj"]}}
    treatments.treat(vlm, TreatmentSpec.model_validate(values))
    ranks = {
        (group, name.split(".")[-4], p.shape[0])
        for group, parameters in treatments.groups(vlm).items()
        for name, p in parameters.items()
        if ".lora_A." in name
    }
    assert {rank for group, _, rank in ranks if group == "vision"} == {2}
    assert {(name, rank) for group, name, rank in ranks if group == "llm"} == {("q_proj", 3)}
    scale = {m.scaling["default"] for m in vlm.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scale == {16 / 2, 16 / 3}


@pytest.mark.parametrize("name", ["gemma3", "ovis2"])
def test_a_group_without_linear_layers_gets_no_adapter_and_the_command_that_is_told_works(name):
    with pytest.raises(UserError, match="which has no linear layer") as told:
        treatments.treat(tiny_families.draw(name)[0], TREATMENTS["lora"])
    _, override = shlex.split(told.value.next_step)
    treated = run_spec(None, (override,)).treated
    assert treated.name == "lora_without_projector"
    assert treated.groups() == {**TREATMENTS["lora"].groups(), "projector": GroupSpec(mode="frozen")}
    counted = treatments.count(treatments.treat(tiny_families.draw(name)[0], treated))
    assert counted["projector"]["trained"] == 0 < counted["vision"]["trained"]


def test_targets_that_no_layer_has_are_refused_with_those_it_has():
    vlm, _ = tiny.build(NAMES, words(), seed=0)
    treated = TreatmentSpec.model_validate({"llm": {"mode": "lora", "targets": ["qproj"]}})
    with pytest.raises(UserError, match=r"no linear layer \['qproj'\] in llm(.|\n)*down_proj"):
        treatments.treat(vlm, treated)


def test_each_group_has_its_own_learning_rate():
    vlm, _ = tiny.build(NAMES, words(), seed=0)
    values = {"vision": {"learning_rate": 1e-5}, "llm": "lora", "projector": "scratch", "head": {"learning_rate": 4e-4}}
    treated = TreatmentSpec.model_validate({**values, "word_embedding": "trained"})
    scales = treatments.lr_scales(
        treatments.treat(vlm, treated), treated, TrainSpec(learning_rate=1e-4, vlm_lr_scale=0.1)
    )
    expected = {"vision": 0.1, "projector": 1.0, "llm": 1.0, "word_embedding": 0.1, "head": 4.0}
    assert scales == pytest.approx(expected)
    assert treatments.lr_scales(vlm, TREATMENTS["freeze_vlm"], TrainSpec()) == {"head": 1.0}


@pytest.mark.parametrize(
    ("treatment", "message"),
    [
        ("skratch", r"treatment: no treatment of that name \(nearest: scratch"),
        ({"vison": "frozen"}, r"treatment\.vison: unknown key \(nearest: vision\)"),
        ({"vision": "frozn"}, r"treatment\.vision\.mode: should be"),
        ({"vision": {"mode": "lora", "rnk": 3}}, r"treatment\.vision\.rnk: unknown key \(nearest: rank\)"),
        ({"vision": {"mode": "frozen", "rank": 3}}, "which mode lora has and no other"),
        ({"vision": {"mode": "frozen", "learning_rate": 1}}, "a learning rate for frozen parameters"),
        ({"word_embedding": "lora"}, "adapters are for linear layers"),
        ({"name": "full", "vision": "frozen"}, "the name of another treatment"),
        (dict.fromkeys([*VLM_GROUPS, "head"], "frozen"), "nothing would be trained"),
        ({"head": "scratch"}, r"treatment\.head\.mode: should be"),
    ],
)
def test_mistakes_are_named(treatment, message):
    with pytest.raises(UserError, match=message):
        spec_of(treatment)


def test_a_composed_treatment_has_a_run_id_of_its_name_and_content():
    ids = [spec_of({**COMPOSED, "llm": {"mode": "lora", "rank": rank}}).run_id for rank in (4, 8)]
    assert all(run_id.startswith("mixed-s0-") for run_id in ids)
    assert len({*ids}) == 2
    assert RunSpec().run_id == "full-s0-de93b2e433", "a named treatment's runs keep their id"
    assert RunSpec(treatment="scratch").run_id == "scratch-s0-572b359bcf"
    spec = spec_of(COMPOSED)
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_adapters_of_a_mixture_of_full_size_are_counted_and_what_gets_none_is_said(recwarn):
    vlm = treatments.treat(on_meta("Qwen/Qwen3-VL-30B-A3B-Instruct"), TREATMENTS["lora"])
    parts = treatments.groups(vlm)
    assert adapters.without(vlm, parts["llm"]) == {"gate.weight": 48 * 128 * 2048}
    assert set(adapters.without(vlm, parts["vision"])) == {"proj.weight", "pos_embed.weight"}
    assert adapters.without(vlm, parts["projector"]) == {}
    experts = [name for name in parts["llm"] if ".experts." in name and adapters.is_adapter(name)]
    each = 32 * (2048 + 2 * 768) + 32 * (768 + 2048)  # of an expert, beside gate_up_proj and down_proj
    assert sum(parts["llm"][name].numel() for name in experts) == 48 * 128 * each == 1_258_291_200
    named = TreatmentSpec.model_validate({"llm": {"mode": "lora", "targets": ["q_proj", "down_proj"]}})
    vlm = treatments.treat(on_meta("Qwen/Qwen3-VL-30B-A3B-Instruct"), named)
    assert "experts.gate_up_proj" in adapters.without(vlm, treatments.groups(vlm)["llm"])
    assert "experts.down_proj" not in adapters.without(vlm, treatments.groups(vlm)["llm"])
    named = TreatmentSpec.model_validate({"vision": "lora", "llm": {"mode": "lora", "rank": 4}})
    llm = treatments.groups(treatments.treat(on_meta("Qwen/Qwen3-VL-30B-A3B-Instruct"), named))["llm"]
    assert sum(llm[name].numel() for name in experts) == 1_258_291_200 / 8
    assert not [told for told in recwarn if "rank_pattern" in str(told.message)]


BILLIONS = {  # arXiv 2601.03309, main table
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.8,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.3,
    "Qwen/Qwen3-VL-2B-Instruct": 2.1,
    "Qwen/Qwen3-VL-4B-Instruct": 4.4,
    "Qwen/Qwen3-VL-8B-Instruct": 8.8,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 31.1,
    "google/paligemma-3b-pt-224": 2.9,
    "google/paligemma2-3b-pt-224": 3.0,
    "microsoft/kosmos-2-patch14-224": 1.7,
    "OpenGVLab/InternVL3_5-4B-HF": 4.7,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_backbones_have_the_papers_number_of_parameters(name):
    total = sum(p.numel() for parameters in treatments.groups(built(name)).values() for p in parameters.values())
    assert round(total / 1e9, 1) == BILLIONS[name]


def test_what_trains_of_qwen25_vl_3b_under_each_treatment():
    """3.1 B with a frozen encoder, as the paper has it; the others follow from the same groups."""
    billions = {}
    for name in ("full", "freeze_vision", "freeze_word_embedding", "freeze_llm", "freeze_vlm"):
        vlm = treatments.treat(built("Qwen/Qwen2.5-VL-3B-Instruct"), TREATMENTS[name])
        billions[name] = round(sum(c["trained"] for c in treatments.count(vlm).values()) / 1e9, 2)
    assert billions == {
        "full": 3.75,
        "freeze_vision": 3.12,
        "freeze_word_embedding": 3.44,
        "freeze_llm": 0.98,
        "freeze_vlm": 0.0,
    }
