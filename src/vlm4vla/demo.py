"""The main job at CPU scale: a shipped study, then its report and the headline table in the terminal."""

import sys
from pathlib import Path

from vlm4vla.reporting.conclusions import headline
from vlm4vla.reporting.html import report
from vlm4vla.reporting.tables import Results, metrics
from vlm4vla.reporting.tables import load as load_results
from vlm4vla.spec import Runtime
from vlm4vla.studies import matrix, runner

RECIPES = Path(__file__).parent / "recipes"


def demo(out: Path, smoke: bool, jobs: int) -> Path:
    """Run the shipped study into ``out`` (resumes), render and print it; returns the report's path.

    Args:
        smoke: a few steps and episodes, for the machinery only.
        jobs: runs at a time, each with ``2 // jobs`` (at least 1) simulator processes.
    """
    study = matrix.load(RECIPES / ("smoke.yaml" if smoke else "demo.yaml"))
    # Training is one process a run, so two runs at a time fill two cores; each then simulates in one process.
    runtime = Runtime(workers=max(1, 2 // jobs), progress=sys.stderr.isatty())
    runner.run(study, out, runtime, jobs)
    page = report(out, out / "report.html")
    print(table(load_results(out)))
    print(f"\nreport: {page}")
    return page


def table(results: Results) -> str:
    """The headline and a line for each treatment and protocol."""
    columns = metrics(results.protocol_names[0])
    lines: list[tuple[str, ...]] = [("protocol", "treatment", *columns)]
    for row in results.rows:
        lines.append((row.protocol, row.treatment, *(str(row.rates.get(metric, "-")) for metric in columns)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([headline(results), "", *text])
