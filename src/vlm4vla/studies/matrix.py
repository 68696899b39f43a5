"""A study: a YAML file that spans a matrix of runs.

    name: place
    base:                         # keys of RunSpec, nested or dotted
      training: {steps: 1000}
    matrix:                       # dotted keys of RunSpec; every combination is a cell, the last key varies fastest
      treatment: [full, freeze_vision, scratch]
      seed: [0, 1, 2]
    overrides:                    # in order, for cells in which every key of `when` has that value
      - when: {treatment: scratch}
        set: {training.learning_rate: 3e-3}
    differs: [prompt]             # what else the runs do not have in common (vlm4vla audit), e.g. two backbones
    evaluate:                     # EvalSpec: the same for all cells
      protocols: [grinningface/place/val/v1]
      episodes: 100

Cells with the same run id are one cell. How it is executed (``Runtime``) is no part of a study.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from vlm4vla.audit import CHOICES
from vlm4vla.errors import UserError, nearest
from vlm4vla.sims import protocols
from vlm4vla.spec import DataSpec, EvalSpec, RunSpec, SourceSpec, Strict, load_yaml, parse
from vlm4vla.studies.store import Status, Store

MIXTURE = "data.mixture"
RESULTS = "results.sqlite"
"""The store in a study's folder."""


class Override(Strict):
    """``set`` applies to cells in which every key of ``when`` has that value. Keys are dotted keys of ``RunSpec``."""

    when: dict[str, Any]
    set: dict[str, Any]


class Study(Strict):
    """What a study's YAML file holds."""

    name: str = Field(min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    matrix: dict[str, list[Any]] = Field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    differs: tuple[str, ...] = ()
    """Choices (``audit.CHOICES``) in which the runs are not equal, beside those that ``matrix`` and ``overrides``
    decide; any other difference stops the study."""
    evaluate: EvalSpec = EvalSpec()

    @property
    def varied(self) -> set[str]:
        """Keys of a run that differ between cells on purpose."""
        return {*self.matrix, *(key for override in self.overrides for key in override.set)}

    def cells(self) -> list["Cell"]:
        """The matrix's runs in its order, each once.

        Raises:
            UserError: unknown keys, values that a run cannot have, an empty list, or an override that applies nowhere.
        """
        known = list(_leaves(RunSpec))
        keys = [*_flatten(self.base, known), *self.matrix]
        keys += [key for override in self.overrides for key in (*override.when, *override.set)]
        unknown = [f"{key} (nearest: {nearest(key, known)})" for key in keys if key not in known]
        if unknown:
            raise UserError(
                f"study {self.name}: unknown keys {', '.join(unknown)}", "keys of RunSpec in spec.py", "mend the study"
            )
        if strange := [
            f"{name} (nearest: {nearest(name, list(CHOICES))})" for name in self.differs if name not in CHOICES
        ]:
            raise UserError(
                f"study {self.name}: no choice {', '.join(strange)}", "names that vlm4vla audit shows", "mend `differs`"
            )
        empty = [key for key, values in self.matrix.items() if not values]
        if empty:
            raise UserError(f"study {self.name}: no value for {', '.join(empty)}", "a list", "mend the study")
        overrides = [(self._when(override), override.set) for override in self.overrides]
        applied = [False] * len(overrides)
        cells: dict[str, Cell] = {}
        for values, texts in zip(product(*self.matrix.values()), product(*self._shown().values()), strict=True):
            flat = {**_flatten(self.base, known), **dict(zip(self.matrix, values, strict=True))}
            labels = dict(zip(self.matrix, texts, strict=True))
            run = self._run(flat)
            for i, (when, changes) in enumerate(overrides):
                if all(_value(run, key) == value for key, value in when.items()):
                    applied[i] = True
                    flat |= changes
                    run = self._run(flat)
            cells.setdefault(run.run_id, Cell(run, self.evaluate, labels))
        for override, used in zip(self.overrides, applied, strict=True):
            if not used:
                raise UserError(
                    f"study {self.name}: no cell for the override `when: {override.when}`",
                    "overrides that apply to at least one cell, in their order",
                    "mend its values, or remove it",
                )
        return list(cells.values())

    def _when(self, override: Override) -> dict[str, Any]:
        """The values as a run would have them: YAML reads ``1e-3`` as text."""
        source = f"study {self.name}, an override's `when`"
        return {key: _value(parse(RunSpec, _nest({key: value}), source), key) for key, value in override.when.items()}

    def _shown(self) -> dict[str, list[Any]]:
        """The matrix with a short text for each mixture."""
        if MIXTURE not in self.matrix:
            return self.matrix
        source = f"study {self.name}, {MIXTURE}"
        mixtures = [parse(DataSpec, {"mixture": values}, source).mixture for values in self.matrix[MIXTURE]]
        return {**self.matrix, MIXTURE: _told(mixtures)}

    def _run(self, flat: dict[str, Any]) -> RunSpec:
        return parse(RunSpec, _nest(flat), f"study {self.name}")


@dataclass(frozen=True)
class Cell:
    """One run of a study and how it is evaluated."""

    run: RunSpec
    evaluate: EvalSpec
    labels: dict[str, Any]
    """The matrix's keys and this cell's values; of a mixture a short text."""

    @property
    def run_id(self) -> str:
        return self.run.run_id

    @property
    def title(self) -> str:
        """Its treatment and what else the matrix varies, but for the training seed.

        Keys in full: ``data.seed=0`` must not read as the training seed.
        """
        others = {key: value for key, value in self.labels.items() if key not in ("treatment", "seed")}
        return ", ".join([self.run.treated.name, *(f"{key}={value}" for key, value in others.items())])

    def wanted(self) -> Iterator[tuple[str, str, int]]:
        """``(run id, protocol, episodes)`` of every evaluation, the final policy's first, then the curve's by step."""
        for protocol in self.evaluate.protocols:
            yield self.run_id, protocol, self.evaluate.episodes
        if self.evaluate.curve_episodes:
            for step in curve_steps(self.run):
                for protocol in self.evaluate.protocols:
                    yield curve_id(self.run_id, step), protocol, self.evaluate.curve_episodes


def _told(mixtures: list[tuple[SourceSpec, ...]]) -> list[str]:
    """``0.5 questions/conversations.jsonl`` and the like for each: as much of the paths as tells them apart."""
    lengths = [len(Path(_path(source)).parts) for mixture in mixtures for source in mixture]
    told: list[str] = []
    for number in range(2, max([2, *lengths]) + 1):
        told = [
            " + ".join(f"{each.weight:g} {Path(*Path(_path(each)).parts[-number:])}" for each in mixture) or "none"
            for mixture in mixtures
        ]
        if len(set(told)) == len(set(mixtures)):
            return told
    return [f"{text} ({place})" for place, text in enumerate(told, 1)]  # they differ in `images`


def _path(source: SourceSpec) -> str:
    return str(source.folder or source.conversations)


def curve_steps(run: RunSpec) -> list[int]:
    """Training steps after which a policy is kept, without the last, whose policy is the result."""
    number = run.training.checkpoints
    steps = {round(run.training.steps * i / number) for i in range(1, number)}
    return sorted(steps - {0, run.training.steps})


def curve_id(run_id: str, step: int) -> str:
    """Under which an intermediate policy's episodes are stored: ``<run_id>@step-000500``."""
    return f"{run_id}@step-{step:06d}"


def load(path: Path | str) -> Study:
    """Read a study and check all of it: keys, values, protocols.

    Raises:
        UserError: naming what is wrong and the nearest names.
    """
    study = parse(Study, load_yaml(path), str(path))
    shortest = min(cell.run.head.chunk for cell in study.cells())
    for name in study.evaluate.protocols:
        protocol = protocols.protocol(name)
        protocol.check_episodes(max(study.evaluate.episodes, study.evaluate.curve_episodes))
        if protocol.execute > shortest:  # found before the training, not after it
            raise UserError(
                f"head.chunk={shortest} in {path}",
                f"at least the {protocol.execute} actions that {name} executes of each chunk",
                f"set base.head.chunk, or evaluate under {name.partition('+')[0]}+execute={shortest}",
            )
    return study


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PlanRow:
    """How far a cell is."""

    cell: Cell
    status: Literal["todo", "partial", "done"]
    run: Status
    """Of the run's row in the store."""
    missing: dict[str, int]
    """Episodes still to do by protocol, those of intermediate policies included; faults count as missing."""
    message: str = ""
    """Why the last attempt failed."""


@dataclass(frozen=True)
class Plan:
    """A study's cells and what each still needs; prints as a table."""

    name: str
    rows: list[PlanRow]

    def __str__(self) -> str:
        table = [("cell", "status", "run", "episodes missing")]
        for row in self.rows:
            labels = " ".join(f"{key}={value}" for key, value in row.cell.labels.items())
            missing = ", ".join(f"{number} {protocol}" for protocol, number in row.missing.items() if number)
            table.append((f"{row.cell.run_id}  {labels}".strip(), row.status, row.run, missing or "-"))
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, line[:3], widths), line[3]]) for line in table]
        failed = [f"{row.cell.run_id} failed: {row.message}" for row in self.rows if row.run == "failed"]
        done = sum(row.status == "done" for row in self.rows)
        return "\n".join([*lines, *failed, f"{self.name}: {done} of {len(self.rows)} cells done"])


def plan(study: Study, folder: Path | None = None) -> Plan:
    """What is done and what is missing in ``folder`` (nothing is, without one). Creates nothing."""
    if folder is None or not (folder / RESULTS).is_file():
        return Plan(study.name, [_plan_row(cell, None) for cell in study.cells()])
    with Store(folder / RESULTS) as store:
        return Plan(study.name, [_plan_row(cell, store) for cell in study.cells()])


def _plan_row(cell: Cell, store: Store | None) -> PlanRow:
    missing: dict[str, int] = {}
    begun = False
    for run_id, protocol, episodes in cell.wanted():
        finished = store.finished(run_id, protocol, episodes) if store else 0
        missing[protocol] = missing.get(protocol, 0) + episodes - finished
        begun = begun or finished > 0
    row = store.runs().get(cell.run_id) if store else None
    run: Status = row.status if row else "planned"
    begun = begun or run in ("training", "trained")
    status = "partial" if begun else "todo"
    done = not any(missing.values()) and (missing or run == "done")  # without protocols a cell only trains
    return PlanRow(cell, "done" if done else status, run, missing, row.message if row else "")


# ---------------------------------------------------------------------------------------------------------- dotted keys


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """``treatment``, ``training.steps``, ...: everything of a spec that can be set."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _flatten(values: dict[str, Any], known: list[str], prefix: str = "") -> dict[str, Any]:
    """Nested or dotted keys -> dotted ones; a mapping at a known key is that key's value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            flat |= _flatten(value, known, f"{key}.")
        else:
            flat[key] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _value(run: RunSpec, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value
