"""Reads ``metrics.jsonl``, one JSON object a line, which training appends to while others read."""

import json
from pathlib import Path
from typing import Literal

from vlm4vla.errors import UserError

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
"""Packages that training can tell the rows as well."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows; none without a file. A last line cut short by a kill is passed over.

    Raises:
        UserError: another line is damaged.
    """
    rows = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is not JSON", "one JSON object a line", f"mend {path}"
                ) from error
    return rows
