"""What `compare --list` prints."""

import pytest
from matrix import ENCODED

from comparison import compare
from strategy import available


def test_every_strategy_is_a_line_with_its_layers_budget_paper_and_needs(capsys):
    with pytest.raises(SystemExit) as end:
        compare.parse(["--list"])
    assert not end.value.code
    header, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [cell for cell in line.split("  ") if cell] for line in lines}
    assert header.split()[0] == "strategy"
    assert tuple(rows) == available()
    cells = [cell.strip() for cell in rows["v2drop"]]
    assert cells == ["v2drop", "3, 17, 22", "288/144/1", "CVPR 2026, arXiv 2509.01552", "a prune at layer 1 or later"]
    assert [cell.strip() for cell in rows["uniform"]] == ["uniform", "0", "192", "-", "nothing else"]
    assert "a second prefill without the question" in rows["priortr_2f"][-1]
    assert {name for name, row in rows.items() if "the vision tower" in row[-1]} == set(ENCODED)
