"""Run every check on every tiny family and write what came out into the table of docs/backbones.md.

python scripts/families_table.py
"""

import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
warnings.filterwarnings("ignore")

from transformers import logging  # noqa: E402

import tiny_families  # noqa: E402
from vlm4vla.backbones.check import Check  # noqa: E402
from vlm4vla.backbones.families import family  # noqa: E402
from vlm4vla.backbones.show import departures  # noqa: E402
from vlm4vla.backbones.vlm import Backbone  # noqa: E402
from vlm4vla.files import replacing  # noqa: E402

PAGE = ROOT / "docs" / "backbones.md"
SIZE = 64
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->"
HEADER = [
    "| family (tiny model) | row | checks passed | worst difference | eight samples by heart |",
    "|---|---|---|---|---|",
]


def row(name: str) -> str:
    vlm, processor = tiny_families.draw(name)
    findings = list(Check(Backbone(vlm, processor), SIZE).run())
    passed = [finding for finding in findings if finding.ok]
    differences = [float(found[1]) for f in findings if (found := re.search(r"differs by (\S+) at most", f.detail))]
    says = ", ".join(departures(family(vlm.config))) or "none"
    title = f"{family(vlm.config).title} (`{name}`, {type(vlm).__name__})"
    failed = "".join(f"; **fails: {finding.name}**" for finding in findings if not finding.ok)
    learnt = next(finding.detail for finding in findings if finding.name == "memorises")
    cells = [title, says, f"{len(passed)} of {len(findings)}{failed}", f"{max(differences):.1e}", learnt]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def main() -> None:
    logging.set_verbosity_error()
    rows = []
    for name in tiny_families.FAMILIES:
        rows.append(row(name))
        print(rows[-1], flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    with replacing(PAGE) as partial:
        partial.write_text(before + BEGIN + "\n".join([*HEADER, *sorted(rows, key=str.lower)]) + "\n" + END + after)


if __name__ == "__main__":
    main()
