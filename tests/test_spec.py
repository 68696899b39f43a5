"""The identity of a run: what changes it, what does not, and what a wrong file is told."""

from pathlib import Path

import pytest

from vlm4vla.data.convert.rlds import load_mapping
from vlm4vla.errors import UserError
from vlm4vla.spec import DataSpec, RunSpec, Runtime, TrainSpec, load_yaml, parse


def test_anything_that_can_change_a_number_changes_the_run_id():
    base = RunSpec()
    others = [
        {"treatment": "scratch"},
        {"seed": 1},
        {"data": {"episodes": 5}},
        {"training": {"batch_size": 8}},
        {"head": {"chunk": 3}},
        {"proprioception": True},
        {"backbone": "other"},
    ]
    assert len({base.run_id, *(RunSpec.model_validate(values).run_id for values in others)}) == 1 + len(others)


def test_spelling_a_default_out_changes_nothing_and_runtime_is_no_part_of_it():
    assert RunSpec.model_validate({"data": {"episodes": 400}, "training": {}}).run_id == RunSpec().run_id
    assert not Runtime.model_fields.keys() & RunSpec.model_fields.keys()


def test_demonstrations_come_from_a_protocol_or_a_folder():
    assert DataSpec(episodes=5).protocol == DataSpec().protocol
    assert DataSpec(folder="x").protocol is None
    assert DataSpec.model_validate(DataSpec(folder="x").model_dump()) == DataSpec(folder="x")
    for values in ({"protocol": "a", "folder": "x"}, {"protocol": None}):
        with pytest.raises(UserError, match="one of the two"):
            parse(DataSpec, values, "here")


def test_an_unknown_key_of_a_section_is_compared_with_that_section():
    with pytest.raises(UserError, match=r"training\.stepz: unknown key \(nearest: steps\)"):
        parse(RunSpec, {"training": {"stepz": 3}}, "here")
    with pytest.raises(UserError, match=r"nonsense: unknown key \(nearest: .*treatment"):
        parse(RunSpec, {"nonsense": 3}, "here")


def test_an_unknown_key_names_the_file_of_its_model(tmp_path):
    (tmp_path / "mine.yaml").write_text("images: {main: a}")
    for call, module in (
        (lambda: parse(RunSpec, {"nonsense": 3}, "here"), "spec"),
        (lambda: load_mapping(str(tmp_path / "mine.yaml")), "data/convert/rlds"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert error.value.expected.endswith(f" in src/vlm4vla/{module}.py")
        assert (Path(__file__).parents[1] / f"src/vlm4vla/{module}.py").is_file()


def test_numbers_of_another_augmentation_are_refused():
    values = {"augment": "crop_and_colour"}
    plain = parse(TrainSpec, values, "here")
    assert TrainSpec.model_validate(plain.model_dump(mode="json")) == plain
    for given in ({"image_jitter": 0.0}, {"image_shift": 10}):
        assert parse(TrainSpec, given, "here")
        with pytest.raises(UserError, match=f"{next(iter(given))} given, which the augmentation jitter_and_shift"):
            parse(TrainSpec, values | given, "here")


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_yaml(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="no file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(UserError, match="not YAML"):
        load_yaml(tmp_path / "binary.yaml")


def test_fields_that_came_later_leave_ids_and_files_as_they_were():
    plain, quantile = RunSpec(), RunSpec.model_validate({"head": {"normalize": "quantile", "bound": 1.0}})
    assert plain.run_id == quantile.run_id == "full-s0-de93b2e433"
    assert "normalize" not in plain.model_dump()["head"]
    other = RunSpec.model_validate({"head": {"normalize": "fixed", "bound": 0.65}})
    assert other.run_id != plain.run_id
    assert RunSpec.model_validate(other.model_dump(mode="json")) == other
