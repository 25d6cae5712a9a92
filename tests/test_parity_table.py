"""The command that measures docs/parity.md."""

from pathlib import Path

import pytest

from tests.reference import parity

DOCUMENT = Path(__file__).parent.parent / "docs" / "parity.md"


def test_the_table_is_replaced_between_its_markers_and_nothing_else(tmp_path):
    document = tmp_path / "parity.md"
    document.write_text(f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n")
    parity.main(["--only", "loss_scl", "--write", str(document)])
    lines = document.read_text().splitlines()
    assert lines[:2] == ["before", parity.BEGIN] and lines[-2:] == [parity.END, "after"]
    assert "old" not in lines
    cells = lines[4].split("|")
    assert "loss_scl" in cells[2] and float(cells[4]) < 1e-5 and float(cells[5]) < 1e-8


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        parity.replaced("no markers", "| table |")


def test_the_published_table_has_a_row_for_every_golden():
    measured = DOCUMENT.read_text().partition(parity.BEGIN)[2].partition(parity.END)[0]
    for name in parity.goldens.index(parity.goldens.OWN):
        assert f"| {name} |" in measured, name
