"""The adapter on the embedded VLM with random weights: padding, batch-mates, the native forward, save and reload."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from vlm4vla.backbones import tiny, treatments
from vlm4vla.backbones.families import QUESTION
from vlm4vla.backbones.inputs import prompt
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import Backbone, save_vlm
from vlm4vla.errors import UserError
from vlm4vla.skills.questions import words
from vlm4vla.spec import VLM_GROUPS

NAMES = ["cat", "cat face", "ant", "red apple"]
TEXTS = ["place the block on cat face", "pick the block and place it on ant", "place it on red apple"]


@pytest.fixture(scope="module")
def vlm_and_processor():
    return tiny.build(NAMES, words(), seed=0)


@pytest.fixture
def backbone(vlm_and_processor):
    backbone = Backbone(*vlm_and_processor).eval()
    torch.nn.init.normal_(backbone.query, generator=torch.Generator().manual_seed(1))
    return backbone


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8))


def test_a_name_is_one_token_and_never_a_part_of_a_word(vlm_and_processor):
    tokenizer = vlm_and_processor[1].tokenizer
    assert tokenizer.tokenize("where is the Cat Face") == ["where", "is", "the", "cat face"]
    assert tokenizer.tokenize("elephant") == ["<unk>"]


def test_every_word_of_the_prompt_is_known(vlm_and_processor):
    tokenizer = vlm_and_processor[1].tokenizer
    for text in TEXTS:
        assert "<unk>" not in tokenizer.tokenize(QUESTION.format(instruction=text))


def test_output_does_not_depend_on_padding_or_batch_mates(backbone, images):
    together = backbone(backbone.encode(images, TEXTS))
    for i, text in enumerate(TEXTS):
        alone = backbone(backbone.encode(images[i : i + 1], [text]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_hidden_state_equals_the_native_model_with_a_real_extra_token(backbone, images):
    vlm, processor = backbone.vlm, backbone.processor
    token = processor.tokenizer.convert_tokens_to_ids("gripper")
    with torch.no_grad():
        backbone.query.copy_(vlm.get_input_embeddings().weight[token])
    text = prompt(processor, QUESTION.format(instruction=TEXTS[0])) + " gripper"
    native = vlm.model(**processor(text=text, images=images[:1], return_tensors="pt")).last_hidden_state[:, -1]
    ours = backbone(backbone.encode(images[:1], TEXTS[:1]))
    torch.testing.assert_close(ours, native, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_group_and_the_query(backbone, images):
    backbone.zero_grad()
    backbone(backbone.encode(images, TEXTS)).square().sum().backward()
    assert backbone.query.grad.abs().sum() > 0
    for group, parameters in treatments.groups(backbone.vlm).items():
        reached = sum(p.grad.abs().sum() for p in parameters.values() if p.grad is not None)
        assert (reached > 0) == (group in VLM_GROUPS), group


def test_plain_transformers_opens_what_we_save(backbone, images, tmp_path):
    save_vlm(backbone.vlm, backbone.processor, tmp_path)
    again = Backbone(
        AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    ).eval()
    again.query.data = backbone.query.data
    assert torch.equal(again(again.encode(images, TEXTS)), backbone(backbone.encode(images, TEXTS)))


def test_fast_pixels_equal_the_processor(vlm_and_processor, images):
    native = CLIPImageProcessorPil.from_dict(vlm_and_processor[1].image_processor.to_dict())
    assert torch.equal(
        tiny.pixels(torch.from_numpy(np.stack(images))), native(images, return_tensors="pt")["pixel_values"]
    )


def test_unknown_backbone_names_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="image-text-to-text"):
        load_vlm(str(tmp_path))


def test_pickled_weights_are_not_read(vlm_and_processor, tmp_path):
    save_vlm(*vlm_and_processor, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(vlm_and_processor[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_vlm(str(tmp_path))


def test_weights_cut_short_are_named_and_nobody_is_sent_to_the_hub(vlm_and_processor, tmp_path):
    save_vlm(*vlm_and_processor, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="backbone") as caught:
        load_vlm(str(tmp_path))
    assert "hf download" not in str(caught.value)


def test_an_error_without_words_is_named_by_its_kind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match="OSError"):
        load_vlm(str(tmp_path))


def test_a_name_that_can_be_no_hub_id_is_not_asked_for_there(monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no backbone 'nope'"):
        load_vlm("nope")


def test_the_query_starts_at_zero_or_with_the_spread_of_words(vlm_and_processor):
    vlm, processor = vlm_and_processor
    assert not Backbone(vlm, processor).query.any()
    torch.manual_seed(0)
    drawn = Backbone(vlm, processor, query_init="normal").query
    assert 0.8 < float(drawn.std() / vlm.get_input_embeddings().weight.std()) < 1.25


def test_texts_are_made_with_one_look_at_a_picture_of_their_size(vlm_and_processor, monkeypatch):
    looked = []
    kind = type(vlm_and_processor[1].image_processor)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args, **options: (looked.append(1), original(*args, **options))[1])
    inputs = Backbone(*vlm_and_processor).inputs
    for text in TEXTS:
        inputs.tokens([text], 96, 96)
    assert len(looked) == 1
    inputs.answers([(("user", "where is the cat"), ("assistant", "left"))], 96, 96)
    assert len(looked) == 1
    inputs.tokens(TEXTS[:1], 64, 64)
    assert len(looked) == 2
    inputs.native([np.zeros((96, 96, 3), np.uint8)], [inputs.prompt(TEXTS[0])])
    assert len(looked) == 3, "the processor itself goes on looking"
