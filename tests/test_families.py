"""Every family through its real transformers classes and processor, with random weights (``tiny_families``)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")

from transformers.utils import is_timm_available

import tiny_families
from vlm4vla.backbones.adapters import is_adapter
from vlm4vla.backbones.check import Check
from vlm4vla.backbones.families import FAMILIES, family
from vlm4vla.backbones.inputs import Inputs
from vlm4vla.backbones.vlm import Backbone, auto_class, save_vlm
from vlm4vla.convention import LIBERO
from vlm4vla.data.normalize import Normalizer
from vlm4vla.errors import UserError
from vlm4vla.policy import Policy, untrained
from vlm4vla.spec import RunSpec, TrainSpec, TreatmentSpec
from vlm4vla.training.processes import receive
from vlm4vla.types import Observation

CPU = torch.device("cpu")
SIZE = 64
"""Not the side the families are made for: pictures have to be resized."""
TWINS = {"idefics3", "glm46v", "llava", "qwen2_vl", "qwen3_vl_untied", "qwen3_5_moe", "gemma4_moe"}
TWINS |= {name for name, build in tiny_families.FAMILIES.items() if build.__module__ == "more_families"}
"""Out of the fast tier: nearly another family's code, or nothing but a row."""
TIMM = pytest.mark.skipif(not is_timm_available(), reason="its vision tower is timm's: make setup, or pip install timm")


def each(*, fast: set[str] | None = None) -> list:
    """All families; outside the fast tier those that are not among ``fast``."""
    fast = tiny_families.FAMILIES.keys() - TWINS if fast is None else fast
    return [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name not in fast) + [TIMM] * (name in ("gemma3n", "perception_lm")),
        )
        for name in tiny_families.FAMILIES
    ]


def drawn(name: str) -> Backbone:
    return Backbone(*tiny_families.draw(name))


@pytest.mark.parametrize("name", each())
def test_a_family_keeps_the_adapters_promises(name):
    findings = list(Check(drawn(name), SIZE).run(forward_only=True))
    assert len(findings) == 7
    assert not [finding for finding in findings if not finding.ok]


@pytest.mark.parametrize("name", each(fast={"paligemma1", "qwen3_vl"}))
def test_a_family_learns_eight_samples_by_heart(name):
    ok, detail = Check(drawn(name), SIZE).memorises()
    assert ok, detail


@pytest.mark.parametrize("name", each())
def test_a_process_that_read_no_weight_receives_all_that_the_forward_pass_needs(name, monkeypatch):
    backbone, sent = drawn(name), []
    processor, config = tiny_families.FAMILIES[name]()
    with torch.device("meta"):
        blank = Backbone(auto_class(config).from_config(config, dtype=torch.float32), processor).eval()
    monkeypatch.setattr(torch.distributed, "broadcast", lambda value, source: sent.append(value.clone()))
    receive(backbone, torch.device("cpu"), 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda value, source: value.copy_(sent.pop(0)))
    receive(blank, torch.device("cpu"), 2)
    assert not sent
    inputs = backbone.encode(np.full((2, SIZE, SIZE, 3), 100, np.uint8), ["push", "pull it"])
    with torch.no_grad():
        assert torch.equal(blank(inputs), backbone(inputs))


# Of the LLM alone: Gemma 3n's vision tower and several projectors have no linear layer.
ADAPTED = TreatmentSpec.model_validate({"vision": "frozen", "projector": "frozen", "llm": "lora"})


@pytest.mark.parametrize("treatment", [pytest.param("full", id="full"), pytest.param(ADAPTED, id="adapted")])
@pytest.mark.parametrize("name", each())
def test_weights_that_are_cast_once_give_the_same_actions(name, treatment):
    spec = RunSpec(query_init="normal", treatment=treatment, training=TrainSpec(precision="bf16"))
    vla = untrained(*tiny_families.draw(name), spec).eval()
    with torch.no_grad():
        for path, parameter in vla.named_parameters():
            parameter.normal_(0, 0.1) if is_adapter(path) else None  # they add nothing at first
    actions = np.eye(7, dtype=np.float32)
    policy = Policy(vla, spec, LIBERO, Normalizer.fit(actions), None, SIZE, {})
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    look = [Observation({"main": image}, "push"), Observation({"main": image}, "pull it")]
    cast_each_time = [chunk.actions for chunk in policy.predict(look)]
    assert np.ptp(cast_each_time) > 0.1
    assert np.array_equal([chunk.actions for chunk in policy.for_acting(CPU).predict(look)], cast_each_time)
    assert {p.dtype for p in vla.parameters()} == {torch.bfloat16, torch.float32}


def test_every_row_is_tried():
    assert FAMILIES.keys() <= {build()[1].model_type for build in tiny_families.FAMILIES.values()}


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava", "paligemma1"])
def test_no_prompt_begins_twice(name):
    """The tokenizers of these families add a bos token, and some of their templates write one as well."""
    backbone = drawn(name)
    bos = backbone.processor.tokenizer.bos_token_id
    inputs = backbone.encode(np.zeros((1, SIZE, SIZE, 3), np.uint8), ["push"])
    assert (inputs["input_ids"] == bos).sum() == 1


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "qwen3_vl",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            "What action should the robotic arm take to push<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("paligemma1", "<image>push"),
        ("kosmos2", "<p>push\n</p>"),
    ],
)
def test_prompts_are_the_papers(name, prompt):
    assert drawn(name).inputs.prompt("push") == prompt


def test_one_tile_a_picture():
    """InternVL makes up to 12 of a picture by itself, SmolVLM and Idefics3 up to 17."""
    picture = torch.zeros(1, 4 * SIZE, 2 * SIZE, 3, dtype=torch.uint8)

    def made(name):
        processor, config = tiny_families.FAMILIES[name]()
        return Inputs(processor, family(config)).pixels(picture)

    for name in ("internvl", "smolvlm", "idefics2", "cohere2_vision", "aya_vision", "ovis2"):
        assert made(name)["pixel_values"].flatten(0, -4).shape[0] == 1, name
    assert len(made("lfm2_vl")["spatial_shapes"]) == len(made("minicpmv4_6")["target_sizes"]) == 1
    assert len(made("molmo2")["pixel_values"]) == 2  # the picture and its one crop


def test_an_instruction_is_tokenised_once_and_pictures_stay_uint8(monkeypatch):
    backbone = drawn("qwen2_5_vl")
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    first = backbone.encode(images, ["push", "pull"])
    assert first["images"].dtype == torch.uint8
    monkeypatch.setattr(backbone.inputs, "native", lambda *_: pytest.fail("prepared again"))
    again = backbone.encode(images, ["pull", "push"])
    assert torch.equal(again["input_ids"], first["input_ids"].flip(0))


def test_a_family_without_a_row_goes_the_common_way():
    class Unknown:
        model_type = "brand_new"

    row = family(Unknown())
    assert (row.title, row.system, row.plain, dict(row.images)) == ("brand_new", None, None, {})


def test_upsampling_as_in_the_release_is_a_named_choice():
    images = np.zeros((1, 224, 224, 3), np.uint8)
    counts = []
    for compat in ((), ("upsample_448",)):
        vlm, processor = tiny_families.draw("qwen2_5_vl")
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1 << 20}  # as the released models
        backbone = Backbone(vlm, processor, compat)
        inputs = backbone.encode(images, ["push"])
        assert inputs["images"].shape == images.shape
        counts.append(int((inputs["input_ids"] == vlm.config.image_token_id).sum()))
        assert backbone(inputs).isfinite().all()
    assert counts == [64, 256]


@pytest.mark.parametrize("side", [112, 140])
def test_pictures_of_one_size_take_one_attention_call_a_vision_layer(side, monkeypatch):
    """Windows of 4 x 4 patches tile 8 x 8 of them, and do not tile 10 x 10: then each window is a call, as before."""
    vlm, processor = tiny_families.draw("qwen2_5_vl")
    vlm.model.visual.window_size = 56
    processor.image_processor.size = {"shortest_edge": side**2, "longest_edge": side**2}
    backbone = Backbone(vlm, processor)
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    inputs = backbone.encode(images, ["push"] * 3)
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(arguments[0].shape)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        fast = backbone(inputs)
        fast_calls = len(calls) - len(vlm.model.language_model.layers)
        calls.clear()
        backbone.packed = None
        vlm.model.visual.config._attn_implementation = "sdpa"
        plain = backbone(inputs)
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=0)
    windows = {112: 1, 140: 3 * 9}[side]
    assert fast_calls == windows + 1
    assert len(calls) - len(vlm.model.language_model.layers) == {112: 3 * 4, 140: 3 * 9}[side] + 3


@pytest.mark.parametrize("name", ["qwen3_vl", "paligemma1"])
def test_prompts_padded_to_one_length_give_the_same_numbers(name):
    backbone = drawn(name)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    before = backbone.encode(images, ["push", "pull it"])
    backbone.inputs.length = before["input_ids"].shape[1] + 5
    after = backbone.encode(images, ["push", "pull it"])
    assert after["input_ids"].shape[1] == backbone.encode(images[:1], ["go"])["input_ids"].shape[1]
    assert torch.equal(after["query_position"], before["query_position"])
    with torch.no_grad():
        torch.testing.assert_close(backbone(after), backbone(before), atol=1e-5, rtol=1e-5)


def test_a_saved_model_asks_for_nothing_of_ours(tmp_path):
    backbone = drawn("qwen3_vl_moe")
    save_vlm(backbone.vlm, backbone.processor, tmp_path)
    assert "vlm4vla" not in (tmp_path / "config.json").read_text()


def test_positions_of_several_axes_are_found_once_an_instruction(monkeypatch):
    backbone = drawn("qwen3_vl")
    inputs = backbone.encode(np.zeros((2, SIZE, SIZE, 3), np.uint8), ["push", "pull it"])
    assert inputs["position_ids"].shape == (3, *inputs["input_ids"].shape)
    monkeypatch.setattr(backbone.core, "get_rope_index", lambda *_, **__: pytest.fail("found again"))
    assert backbone(inputs).isfinite().all()


def test_an_instruction_with_a_special_token_is_refused():
    backbone = drawn("qwen3_vl")
    with pytest.raises(UserError, match=re.escape("<|im_end|>")):
        backbone.encode(np.zeros((1, SIZE, SIZE, 3), np.uint8), ["push<|im_end|>"])


def test_the_table_in_the_docs_has_every_family_and_no_failure():
    page = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
    table = page[page.index("<!-- families -->") : page.index("<!-- end of families -->")]
    assert set(re.findall(r"\(`(\w+)`", table)) == tiny_families.FAMILIES.keys()
    assert "fails" not in table


@pytest.mark.parametrize(("name", "where"), [("smolvlm", "cpu"), ("idefics3", "cpu"), ("qwen3_vl", "cuda")])
def test_a_lanczos_filter_is_left_to_the_cpu(name, where):
    assert drawn(name).inputs.picture_device(torch.device("cuda")).type == where
