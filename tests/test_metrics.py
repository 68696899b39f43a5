"""The one reader of metrics.jsonl: training appends to the file while others read it, and may be killed."""

import pytest

from vlm4vla.errors import UserError
from vlm4vla.metrics import read_metrics


def test_a_line_cut_short_is_passed_over_but_not_a_damaged_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert read_metrics(path) == [{"step": 10, "loss": 1.0}]
    path.write_text('{"step": 10, "lo\n{"step": 20, "loss": 1.0}\n')
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)
