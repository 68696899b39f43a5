"""One self-contained HTML page about a study: opens offline, needs no script, light and dark, phone and desktop."""

import base64
import html
import io
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from vlm4vla import __version__, audit
from vlm4vla.evaluation.filmstrip import strip_path
from vlm4vla.files import write_text
from vlm4vla.metrics import read_metrics
from vlm4vla.reporting import conclusions, plots, published
from vlm4vla.reporting.plots import Point
from vlm4vla.reporting.tables import (
    IN_A_ROW,
    LENGTH,
    STUDY,
    Cell,
    Results,
    Row,
    label,
    load,
    metrics,
    pool,
    setting,
    split,
)
from vlm4vla.sims.calvin import CHAIN
from vlm4vla.sims.protocols import protocol
from vlm4vla.studies.runner import run_folder
from vlm4vla.studies.stats import Estimate

TEMPLATE = "report.html.j2"
FRAMES = 6
"""Frames shown of an episode: the first, the last and some between."""
GAP = 2
"""Pixels between frames."""
CURVES = (("loss", "loss", True), ("grad_norm", "gradient norm before clipping", True), ("lr", "learning rate", False))
"""Key of ``metrics.jsonl``, title, logarithmic."""


@dataclass(frozen=True)
class Strip:
    uri: str
    caption: str
    share: float
    """Its frames as a fraction of ``FRAMES``: all strips are shown at one scale."""


def report(study_folder: Path, out: Path) -> Path:
    """Render the study in ``study_folder``, finished or not, to the HTML file ``out``.

    Raises:
        UserError: no study there, or damaged results.
    """
    results = load(study_folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(context(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def context(results: Results) -> dict[str, Any]:
    """What the template shows."""
    finished = sum(cell.finished for cell in results.cells)
    colours = {t: plots.COLOURS[i % len(plots.COLOURS)] for i, t in enumerate(results.treatments)}
    return {
        "results": results,
        "headline": conclusions.headline(results),
        "paragraphs": conclusions.paragraphs(results),
        "facts": {
            "treatments": len(results.treatments),
            "training runs": len({cell.run_id for cell in results.cells}),
            "episodes": f"{finished:,}",
            "cells complete": f"{len(results.cells) - len(results.missing)} of {len(results.cells)}",
        },
        "metrics": metrics,
        "shown": {metric for name in results.protocol_names for metric in metrics(name)},
        "label": label,
        "colours": colours,
        "tables": [
            (name, split(name), [r for r in results.rows if r.protocol == name]) for name in results.protocol_names
        ],
        "dots": _dots(results),
        "over_steps": _over_steps(results),
        "curves": _curves(results),
        "strips": {name: _strips(results, name) for name in results.protocol_names},
        "published": published.compare(results),
        "margin": published.MARGIN,
        "protocols": [protocol(name) for name in results.protocol_names],
        "runs": _run_cards(results),
        "audit": _audit(results),
        "versions": _versions(results),
        "faults": Counter(r.fault for cell in results.cells for r in cell.results if r.success is None),
        "study_yaml": (results.folder / STUDY).read_text(),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": __version__,
        "commands": [
            f"vlm4vla study run {results.folder / STUDY} --out {results.folder}",
            f"vlm4vla report {results.folder}",
        ],
    }


def point(rate: Estimate | None) -> Point:
    return Point(rate.estimate, rate.low, rate.high) if rate and rate.n else Point(None)


def _dots(results: Results) -> list[Markup]:
    """A panel for each setting and metric: a line per split, a mark per treatment. Of chains, one with a line for each
    number of tasks in a row."""
    panels = []
    for where in results.settings:
        names = [name for name in results.protocol_names if setting(name) == where]
        if LENGTH in metrics(names[0]):
            series = {t: [point(results.rate(t, names[0], m)) for m in IN_A_ROW] for t in results.treatments}
            title = f"{where}: tasks in a row"
            panels.append(_panel(title, plots.dots(title, [*IN_A_ROW.values()], series)))
            continue
        for metric in metrics(names[0]):
            series = {t: [point(results.rate(t, name, metric)) for name in names] for t in results.treatments}
            if any(p.rate is not None for points in series.values() for p in points):
                chance = results.chance.get(names[0]) if metric == "recognition" else None
                title = _title(f"{where}: {metric}", chance)
                panels.append(_panel(title, plots.dots(title, [split(n) or n for n in names], series, chance)))
    return panels


def _over_steps(results: Results) -> list[Markup]:
    """A panel for each metric and protocol for which policies were evaluated on the way."""
    panels = []
    for name in dict.fromkeys(cell.protocol for cell in results.curve):
        rows = {t: _rows_by_step(results, t, name) for t in results.treatments}
        for metric in [LENGTH] if LENGTH in metrics(name) else metrics(name):
            series = {
                t: [(step, point(row.rates[metric])) for step, row in by_step if metric in row.rates]
                for t, by_step in rows.items()
            }
            if any(series.values()):
                chance = results.chance.get(name) if metric == "recognition" else None
                title = _title(f"{setting(name)}: {label(metric)}, {split(name) or name}", chance)
                top = CHAIN if metric == LENGTH else None
                panels.append(_panel(title, plots.over_steps(title, series, chance, top)))
    return panels


def _rows_by_step(results: Results, treatment: str, name: str) -> list[tuple[int, Row]]:
    """The policies kept on the way by their step, then the last one."""
    by_step: dict[int, list[Cell]] = {}
    for cell in (*results.curve, *results.cells):
        if (cell.treatment, cell.protocol) == (treatment, name):
            by_step.setdefault(cell.step, []).append(cell)
    return [(step, pool(by_step[step])) for step in sorted(by_step)]


def _curves(results: Results) -> list[Markup]:
    rows = {}
    for cell in results.cells:
        rows[cell.run_id] = cell.treatment, read_metrics(run_folder(results.folder, cell.run_id) / "metrics.jsonl")
    panels = []
    for key, title, log in CURVES:
        lines = [
            (treatment, [row["step"] for row in run if key in row], [row[key] for row in run if key in row])
            for treatment, run in rows.values()
        ]
        if any(steps for _, steps, _ in lines):
            panels.append(_panel(title, plots.curves(title, lines, log)))
    return panels


def _title(text: str, chance: float | None) -> str:
    return text if chance is None else f"{text} (dashed: chance, {chance:.0%})"


def _panel(title: str, svg: str) -> Markup:
    return Markup(f"<figure class=panel><figcaption>{html.escape(title)}</figcaption>{svg}</figure>")


# --------------------------------------------------------------------------------------------------------- film strips


def _strips(results: Results, name: str) -> list[tuple[str, Strip | None, Strip | None]]:
    """Each treatment's first success and first failure of which a strip was kept."""
    rows = [
        (t, _first_strip(results, name, t, True), _first_strip(results, name, t, False)) for t in results.treatments
    ]
    return [row for row in rows if row[1] or row[2]]


def _first_strip(results: Results, name: str, treatment: str, success: bool) -> Strip | None:
    for cell in results.select(name, treatment):
        for result in cell.results:
            path = strip_path(run_folder(results.folder, cell.run_id) / "strips", name, result.episode)
            about = path.with_suffix(".json")
            if result.success is success and about.is_file():  # the JSON is written last: the strip is whole
                frames = json.loads(about.read_text())["frames"]
                said = [result.instruction, _outcome(success, result.credits), f"episode {result.episode}"]
                share = min(frames, FRAMES) / FRAMES
                return Strip(_picture(path, frames), " · ".join([*said, f"training seed {cell.seed}"]), share)
    return None


def _outcome(success: bool, credits: dict[str, Any]) -> str:
    if success:
        return "success"
    if credits.get("recognition") is False:
        return "wrong card"
    if credits.get("execution") is False:
        return "not placed"
    return "failure"


def _picture(path: Path, frames: int) -> str:
    """A data URI of at most ``FRAMES`` frames of a strip, the first and the last among them."""
    with Image.open(path) as strip:
        strip = strip.convert("RGB")
    width = strip.width // frames
    number = min(frames, FRAMES)
    shown = [round(i * (frames - 1) / max(1, number - 1)) for i in range(number)]
    image = Image.new("RGBA", (number * (width + GAP) - GAP, strip.height))
    for i, frame in enumerate(shown):
        image.paste(strip.crop((frame * width, 0, (frame + 1) * width, strip.height)), (i * (width + GAP), 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ----------------------------------------------------------------------------------------------------------- run cards


def _run_cards(results: Results) -> list[dict[str, Any]]:
    """What identifies each run, and what it took."""
    cards = []
    for run_id, cell in {cell.run_id: cell for cell in results.cells}.items():
        row = results.runs.get(run_id)
        path = run_folder(results.folder, run_id) / "policy" / "policy.json"
        card = json.loads(path.read_text())["card"] if path.is_file() else {}
        rows = read_metrics(run_folder(results.folder, run_id) / "metrics.jsonl")
        rates = sorted(r["samples_per_s"] for r in rows if "samples_per_s" in r)
        cards.append(
            {
                "run_id": run_id,
                "treatment": cell.treatment,
                "seed": cell.seed,
                "status": row.status if row else "planned",
                "message": row.message if row else "",
                "data_hash": (row.data_hash if row else "") or "–",
                "backbone_hash": card.get("backbone_hash", "–"),
                "steps": f"{int(rows[-1]['step']) if rows else 0:,} of {cell.step:,}",
                "minutes": f"{row.seconds / 60:.1f}" if row and row.seconds else "–",
                "samples_per_s": f"{rates[len(rates) // 2]:.0f}" if rates else "–",
                "demonstrations": card.get("episodes", "–"),
                "parameters": _parameters(card),
            }
        )
    return cards


def _audit(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the trained runs do as executed, and in what they differ; nothing before one is trained."""
    audits = {}
    for cell in results.cells:
        path = run_folder(results.folder, cell.run_id) / "policy" / "policy.json"
        card = json.loads(path.read_text())["card"] if path.is_file() else {}
        if "audit" in card:
            audits[cell.treatment] = audit.Audit.from_dict(card["audit"])
    return audit.rows(audits) if audits else []


def _parameters(card: dict[str, Any]) -> str:
    """``0.9 M of 1.3 M`` trained, the head's included."""
    groups, new = card.get("parameters"), card.get("new_parameters", 0)
    if not groups:
        return "–"
    trained = sum(group["trained"] for group in groups.values()) + new
    frozen = sum(group["frozen"] for group in groups.values())
    return f"{trained / 1e6:.2f} M of {(trained + frozen) / 1e6:.2f} M"


def _versions(results: Results) -> dict[str, str]:
    """Versions of all runs and of the simulators of all their episodes; several of one package are all named."""
    found: dict[str, set[str]] = {}
    episodes = (result.versions for cell in (*results.cells, *results.curve) for result in cell.results)
    for versions in (*(row.versions for row in results.runs.values()), *episodes):
        for name, value in versions.items():
            found.setdefault(name, set()).add(value)
    return {
        name: ", ".join(sorted(values)) + (f" ({len(values)} in one study)" if len(values) > 1 else "")
        for name, values in sorted(found.items())
    }
