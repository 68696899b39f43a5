"""One training by several processes (gloo): the losses and weights of one process, also when killed and resumed."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.exc import Unsupported

import tiny_families
from test_imitation import demonstrations
from vlm4vla.backbones import tiny
from vlm4vla.backbones.vlm import save_vlm
from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics
from vlm4vla.skills.questions import words
from vlm4vla.spec import DataSpec, HeadSpec, RunSpec, Runtime, TrainSpec, TreatmentSpec
from vlm4vla.training import checkpoint, imitation, loop, processes
from vlm4vla.training.compiled import compiled

QUIET = Runtime(device="cpu", progress=False, checkpoint_s=0)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
"""Sums over a batch are taken in another order; Adam makes of a difference in the last digit one of its step size where
a gradient is next to nothing, so weights are compared by the share that agrees."""
STEPS, STOP = 4, 2


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save_vlm(*tiny.build(["cat"], words(), 0), folder / "vlm")
    training = TrainSpec(steps=STEPS, batch_size=4, warmup_steps=0, learning_rate=1e-3, ema=0.5)
    spec = RunSpec(backbone=str(folder / "vlm"), data=DataSpec(folder="x"), training=training, head=HeadSpec(hidden=16))
    return spec, demonstrations(folder / "demos")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(number, target, *arguments):
    """Run ``target`` in ``number`` processes as torchrun would; forked, for torch takes seconds to import."""
    port = free_port()

    def child(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            target(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=child, args=(rank,)) for rank in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def launched(number, job, out, **options):
    """``run`` in ``number`` processes started from nothing, as torchrun starts them; their exit codes."""
    values = [job[0].model_dump_json(), str(job[1]), str(out), json.dumps(options)]
    code = (
        "import json, sys; from pathlib import Path; from test_processes import RunSpec, run;"
        "job = RunSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]);"
        "run(job, Path(sys.argv[3]), **json.loads(sys.argv[4]))"
    )
    environment = {**os.environ, "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *values], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(number)
    ]
    try:
        return [process.wait(300) for process in started]
    finally:
        for process in started:
            process.kill()


def run(job, out, stop=None, **changes):
    """The training of ``job`` with a row and a checkpoint each step, ended before step ``stop``."""
    spec, demos = job
    original, calls = imitation.Imitation.loss, []

    def loss(self, batch, whole):
        calls.append(1)
        if stop is not None and len(calls) > stop:
            os._exit(9)  # as a kill: nothing is put in order
        return original(self, batch, whole)

    def unread(name):
        raise AssertionError(f"{name} is read by more than the first process")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("RANK", "0") != "0":
            patch.setattr(imitation, "load_vlm", unread)
        patch.setattr(loop, "LOG_EVERY", 1)
        patch.setattr(imitation.Imitation, "loss", loss)
        imitation.train(spec, demos, out, QUIET.model_copy(update=changes))


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run(job, out)
    return out


def assert_same(a, b):
    """Losses and gradient norms of every step (or their means, where one row was written), and the policies."""
    for name in ("loss", "loss_pose", "grad_norm"):
        first, second = ([row[name] for row in read_metrics(out / "metrics.jsonl")] for out in (a, b))
        assert len(first) == STEPS
        first = [np.mean(first)] if len(second) == 1 else first
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=2e-6)  # six digits are written
    files = sorted(path.relative_to(a / "policy") for path in (a / "policy").rglob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        first, second = (load_file(out / "policy" / file) for out in (a, b))
        assert first.keys() == second.keys()
        # A bias of keys moves all scores of a softmax alike: its gradient is rounding and nothing else.
        names = [name for name in first if not name.endswith("key.bias")]
        close = [torch.isclose(first[name], second[name], **TOLERANCE).float().mean() for name in names]
        assert all(share > 0.98 for share in close), file
    assert not list(b.glob("checkpoint*"))


def test_a_batch_in_parts_is_the_same_batch(job, alone, tmp_path):
    run(job, tmp_path, accumulate=2)
    assert_same(alone, tmp_path)


def test_gradient_checkpointing_changes_nothing(job, alone, tmp_path):
    """Nor does sharding, where there is one process."""
    run(job, tmp_path, gradient_checkpointing=True, shard=True)
    assert_same(alone, tmp_path)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(job, alone, tmp_path, shard):
    assert together(2, lambda: run(job, tmp_path, shard=shard)) == [0, 0]
    assert_same(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_killed_it_goes_on_with_another_number_of_processes(job, alone, tmp_path, before, after, shard):
    spec, demos = job
    job = spec.model_copy(update={"training": spec.training.model_copy(update={"batch_size": 12})}), demos
    run(job, tmp_path / "alone")
    parts = tmp_path / "parts"
    assert set(launched(before, job, parts, stop=STOP, shard=shard)) == {9}
    assert len(list(parts.glob("checkpoint*.safetensors"))) == (before if shard else 1)
    assert launched(after, job, parts, shard=shard) == [0] * after
    assert_same(tmp_path / "alone", parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_compiled_layers_train_what_others_train(job, tmp_path, name):
    save_vlm(*tiny_families.draw(name), tmp_path / "vlm")
    job = job[0].model_copy(update={"backbone": str(tmp_path / "vlm")}), job[1]
    run(job, tmp_path / "eager")
    run(job, tmp_path / "compiled", compile=True)
    assert_same(tmp_path / "eager", tmp_path / "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_compiled_layers_are_trained_by_two_processes_and_computed_twice(job, tmp_path, name):
    """From nothing: torch's compiler waits for ever in a forked process."""
    save_vlm(*tiny_families.draw(name), tmp_path / "vlm")
    job = job[0].model_copy(update={"backbone": str(tmp_path / "vlm")}), job[1]
    run(job, tmp_path / "eager")
    assert launched(2, job, tmp_path / "compiled", compile=True, gradient_checkpointing=True) == [0, 0]
    assert_same(tmp_path / "eager", tmp_path / "compiled")


@pytest.fixture(scope="module")
def mixture(job, tmp_path_factory):
    """Adapters beside the experts of a mixture, and their training by one process."""
    folder = tmp_path_factory.mktemp("mixture")
    save_vlm(*tiny_families.draw("qwen3_vl_moe"), folder / "vlm")
    spec = job[0].model_copy(update={"backbone": str(folder / "vlm"), "treatment": "lora"})
    run((spec, job[1]), folder / "alone")
    assert (folder / "alone/policy/adapter").is_dir()
    return (spec, job[1]), folder / "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"shard": True}, {"gradient_checkpointing": True}, {"shard": True, "gradient_checkpointing": True}],
    ids=lambda options: "-".join(options) or "ddp",
)
def test_adapters_of_experts_are_trained_by_two_processes(mixture, tmp_path, options):
    """From nothing: a process forked after a backward pass through experts waits for ever."""
    job, alone = mixture
    assert launched(2, job, tmp_path, **options) == [0, 0]
    assert_same(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shard": True}], ids=["ddp", "fsdp2"])
def test_killed_the_training_of_experts_adapters_goes_on(mixture, tmp_path, options):
    job, alone = mixture
    assert set(launched(2, job, tmp_path, stop=STOP, **options)) == {9}
    run(job, tmp_path)
    assert_same(alone, tmp_path)


@pytest.mark.slow
def test_layers_with_adapters_of_experts_compile(mixture, tmp_path):
    job, alone = mixture
    run(job, tmp_path, compile=True)
    assert_same(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 8])
def test_layers_with_adapters_of_experts_compile_in_bf16(mixture, tmp_path, rank):
    (spec, demos), _ = mixture
    treatment = TreatmentSpec.model_validate({"name": "few", "vision": "frozen", "llm": {"mode": "lora", "rank": rank}})
    half = spec.training.model_copy(update={"precision": "bf16"})
    job = spec.model_copy(update={"training": half, "treatment": treatment}), demos
    run(job, tmp_path / "eager")
    run(job, tmp_path / "compiled", compile=True)
    eager, fused = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled"))
    assert len(fused) == STEPS
    # Later rows show steps that Adam made of what rounding left.
    first, second = ([rows[0]["loss"], rows[0]["grad_norm"], rows[1]["loss"]] for rows in (fused, eager))
    np.testing.assert_allclose(first, second, rtol=0.05)


def test_what_does_not_compile_is_told():
    with pytest.raises(UserError, match="leave out --compile"), compiled(nn.Linear(1, 1), Runtime(compile=True)):
        raise Unsupported("a graph break")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --nproc-per-node 2 --master-port {port} --no-python vlm4vla",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {port} -m vlm4vla.cli",
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "fsdp2"])
def test_the_launchers_of_the_docs_train_what_one_process_trains(job, alone, tmp_path, launcher, shard):
    spec, demos = job
    values = spec.model_dump(mode="json", exclude={"data"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    verb = ["train", tmp_path / "run.yaml", "--data", demos, "--out", tmp_path / "out", "--device", "cpu", *shard]
    command = [sys.executable, "-m", *launcher.format(port=free_port()).split(), *map(str, verb)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("next: vlm4vla eval") == 1
    assert_same(alone, tmp_path / "out")


def test_a_batch_that_cannot_be_shared_is_refused(job, tmp_path):
    with pytest.raises(UserError, match="a batch of 4 for 1 processes x 3 parts"):
        run(job, tmp_path, accumulate=3)


def test_parts_draw_what_the_whole_draws():
    whole = np.random.default_rng(1)
    parts = [processes.PartOf(np.random.default_rng(1), 6, slice(at, at + 2)) for at in (0, 2, 4)]
    for draw in (
        lambda rng, count: rng.uniform(0, 1, (count, 1, 3)),
        lambda rng, count: rng.uniform(0, 1, count),
        lambda rng, count: rng.integers(-3, 4, (count, 2)),
        lambda rng, count: rng.normal(size=(count, 2)),
    ):
        assert np.array_equal(draw(whole, 6), np.concatenate([draw(part, 2) for part in parts]))
    with pytest.raises(AssertionError, match="one draw a sample"):
        parts[0].uniform(0, 1, (1, 3))


def test_batches_are_made_ahead_in_order_and_an_error_is_not_lost():
    made = []

    def make(step):
        made.append(step)
        if step == 5:
            raise ValueError("no batch")
        return step

    with processes.ahead(make, range(2, 9)) as coming:
        assert [next(coming) for _ in range(3)] == [2, 3, 4]
        with pytest.raises(ValueError, match="no batch"):
            next(coming)
    assert made[:4] == [2, 3, 4, 5]
    with processes.ahead(make, range(3, 3)) as coming:
        assert list(coming) == []


def test_a_parameter_that_no_gradient_reached_is_kept_and_resumed(tmp_path):
    """LLaVA's vision encoder has a last layer that its projector does not read."""
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    trained = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(trained.values())
    module["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, trained, {}, optimizer, "x")
    again = torch.optim.AdamW(trained.values())
    assert checkpoint.load(tmp_path, trained, {}, again, "x") == 1
    assert again.state_dict()["state"].keys() == {0, 1}
