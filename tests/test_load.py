"""Opening a backbone by name: what is wrong with it is said at once, with the next step."""

import io
import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, LlavaModel

import tiny_families
from vlm4vla.backbones import tiny
from vlm4vla.backbones.families import Family
from vlm4vla.backbones.inputs import Inputs
from vlm4vla.backbones.load import load_blank, load_config, load_processor, load_vlm
from vlm4vla.backbones.vlm import Backbone, save_vlm
from vlm4vla.cli import cli
from vlm4vla.errors import UserError
from vlm4vla.skills.questions import words


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(*tiny.build(["cat"], words(), 0), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "Qwen3-VL-2B-Instruct", "tinny"])
def test_a_misspelt_name_is_told_the_nearest(name):
    with pytest.raises(UserError, match=r"nearest: .*(Qwen/Qwen3-VL-2B-Instruct|tiny)"):
        load_config(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", r"no folder ./no/such/folder \(nearest in .: models\)\n.*\n.*check the path: ls \."),
        ("models/./tinny", r"no folder models/./tinny \(nearest in models: tiny-vlm\)"),
        ("models/tiny-vlm/config.json", r"a file\n.*\n.*name its folder: models/tiny-vlm"),
        ("models", r"no model in models: it has no config.json\n.*\n.*name models/tiny-vlm"),
        ("~/models/tiny-vlm", "write the home folder out: .*/models/tiny-vlm"),
    ],
)
def test_a_path_to_no_model_is_told_without_asking_the_hub(name, says, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    shutil.copytree(saved, "models/tiny-vlm")
    with pytest.raises(UserError, match=says):
        load_config(name)


def test_a_name_that_may_be_a_folder_or_the_hubs_is_told_as_both(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-vlm").mkdir(parents=True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"no folder models/tinny here, (.*) cannot be reached .*models: tiny-vlm"):
        load_config("models/tinny")


RESPONSE: Any = SimpleNamespace(headers={}, status_code=403, request=None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError("403", response=RESPONSE), "hf auth login"),
        (RepositoryNotFoundError("404", response=RESPONSE), "nearest: .*Qwen/Qwen3-VL-2B-Instruct"),
        (LocalEntryNotFoundError("offline"), "hub cannot be reached"),
    ],
)
def test_what_the_hub_answers_is_told_apart(error, says, monkeypatch):
    def refuse(*_, **__):
        raise OSError("transformers' own words") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=says):
        load_config("Qwen/Qwen3-VL-2B-Instrukt")


def test_a_text_only_model_is_no_backbone(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes no pictures"):
        load_vlm(str(tmp_path))


def test_an_encoder_for_the_text_is_no_backbone(tmp_path):
    AutoConfig.for_model("florence2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'florence2' model, with an encoder for its text"):
        load_config(str(tmp_path))


def test_a_package_that_a_family_needs_is_named(folder, monkeypatch):
    def refuse(*_, **__):
        raise ImportError("\nIts tower requires the timm library. You can install it with pip:\n`pip install timm`.")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_config", refuse)
    with pytest.raises(UserError, match=r"Its tower requires the timm library.*\n.*\nnext: pip install timm$"):
        load_blank(str(folder))


def test_a_class_without_a_model_below_its_lm_head_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama4", text_config=sizes | {"vocab_size": 32, "head_dim": 8}, vision_config=sizes)
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UserError, match="Llama4ForConditionalGeneration, whose LM head is within"):
        Backbone(vlm, None)


def test_a_model_that_takes_no_picture_the_common_way_is_said_to_in_one_line(folder, monkeypatch):
    def forward(*_, **__):
        raise TypeError("forward() missing 1 required argument: 'pixels'\nand more")

    monkeypatch.setattr(LlavaModel, "forward", forward)
    checked = run("check", str(folder), "--image-size", "96", "--device", "cpu")
    assert isinstance(checked.exception, UserError)
    assert "(TypeError: forward() missing 1 required argument: 'pixels')" in str(checked.exception)


def test_a_family_newer_than_transformers_is_named(folder):
    change(folder / "config.json", model_type="qwen9_vl")
    with pytest.raises(UserError, match=r"does not know .*\n.*\n.*upgrade transformers"):
        load_vlm(str(folder))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"model_type": "their_vl", "auto_map": {"AutoConfig": "theirs.Theirs"}}),
        ("processor_config.json", {"processor_class": "Theirs", "auto_map": {"AutoProcessor": "theirs.Theirs"}}),
    ],
)
def test_code_of_a_models_repository_is_not_run_whatever_the_terminal_says(file, values, folder, monkeypatch):
    change(folder / file, **values)
    ran = folder / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="code of its own repository, which is never run"):
        load_vlm(str(folder))
    assert not ran.exists()


def test_a_folder_without_a_processor_is_told_how_to_write_one(folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"without its processor(.|\n)*next: write it beside the weights: "):
        load_processor(str(folder))


def test_a_tokenizer_without_words_is_refused(tmp_path):
    pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")
    for part in tiny_families.FAMILIES["qwen3_vl"]():
        part.save_pretrained(tmp_path)
    assert load_processor(str(tmp_path))
    for path in tmp_path.glob("tokenizer*.json"):
        path.unlink()
    with pytest.raises(UserError, match="whose tokenizer has no words"):
        load_processor(str(tmp_path))


def test_weights_of_another_size_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 24})
    with pytest.raises(UserError, match=r"9 have another size .* says \(.*mlp.* instead of \(128, 24\)"):
        load_vlm(str(folder))


def test_weights_of_more_layers_are_not_dropped(folder):
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config=config["text_config"] | {"num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"weights of layers that config.json does not have \(.*layers\.1\."):
        load_vlm(str(folder))


def test_pickled_weights_are_told_from_missing_ones(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled, which are never read"):
        load_vlm(str(folder))


def test_weights_that_are_not_there_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1." not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 9 of its weights"):
        load_vlm(str(folder))


def test_a_template_without_a_picture_is_refused(folder):
    processor = load_processor(str(folder))
    processor.chat_template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    with pytest.raises(UserError, match="no place for a picture"):
        Inputs(processor, Family("any"))
    processor.chat_template = None
    with pytest.raises(UserError, match="without a chat template"):
        Inputs(processor, Family("any"))


def run(*arguments):
    return CliRunner().invoke(cli, ["backbones", *arguments])


def test_list_show_and_check_on_the_command_line(folder):
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in run("list").output
    (folder / "model.safetensors").rename(folder / "elsewhere")
    shown = run("show", str(folder), "--image-size", "96")
    assert shown.exit_code == 0, shown.exception
    assert "36 of them the picture's" in shown.output
    (folder / "elsewhere").rename(folder / "model.safetensors")
    checked = run("check", str(folder), "--image-size", "96", "--forward-only", "--device", "cpu")
    assert checked.exit_code == 0, checked.exception
    assert checked.output.count("ok  ") == 7


def test_a_backbone_that_keeps_a_promise_badly_fails_the_check(folder, monkeypatch):
    """As a model would whose output depends on padding: the mask is left out."""
    from vlm4vla.backbones import vlm

    plain = vlm.Backbone.forward
    monkeypatch.setattr(
        vlm.Backbone,
        "forward",
        lambda self, inputs: plain(self, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}),
    )
    checked = run("check", str(folder), "--image-size", "96", "--forward-only", "--device", "cpu")
    assert isinstance(checked.exception, UserError)
    assert "padded left or right" in checked.exception.found
