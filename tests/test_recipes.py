"""Every study that ships can be read, and the paper's have its hyper-parameters."""

from pathlib import Path

import pytest
import yaml

import vlm4vla
from full_size import CONFIGS
from vlm4vla.spec import EvalSpec
from vlm4vla.studies.matrix import load, plan

RECIPES = sorted((Path(vlm4vla.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_study_spans_cells(path):
    cells = load(path).cells()
    assert cells

    assert yaml.safe_load(path.read_text())["name"] == path.stem


@pytest.mark.parametrize(
    ("name", "steps", "batch", "chunk", "rates"),
    [  # arXiv 2601.03309 and its released configurations
        ("calvin", 30_000, 128, 10, {2e-5}),
        ("bridge", 50_000, 512, 4, {2e-5, 5e-5}),
        ("libero", 50_000, 512, 4, {2e-5, 5e-5}),
    ],
)
def test_the_papers_runs_have_its_numbers(name, steps, batch, chunk, rates):
    (path,) = [path for path in RECIPES if path.stem == f"vlm4vla_{name}"]
    runs = [cell.run for cell in load(path).cells()]
    assert {run.backbone for run in runs} == set(CONFIGS)
    assert {(run.training.steps, run.training.batch_size, run.head.chunk) for run in runs} == {(steps, batch, chunk)}
    assert {run.training.learning_rate for run in runs} == rates
    assert {run.training.learning_rate for run in runs if "Qwen" in run.backbone} == {2e-5}
    assert {(run.seed, run.training.weight_decay, run.training.schedule) for run in runs} == {(123, 0.0, "constant")}
    assert all(run.data.image_size == 224 and run.training.precision == "bf16" for run in runs)


def test_a_study_may_train_only(tmp_path):
    assert EvalSpec(protocols=()).protocols == ()
    (tmp_path / "study.yaml").write_text("name: x\nevaluate: {protocols: []}\n")
    assert [row.status for row in plan(load(tmp_path / "study.yaml")).rows] == ["todo"]
