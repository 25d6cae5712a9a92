"""The command that measures docs/parity.md."""

from pathlib import Path

import pytest

from tests.reference import parity

DOCUMENT = Path(__file__).parent.parent / "docs" / "parity.md"


def test_the_table_is_replaced_between_its_markers_and_nothing_else(tmp_path, monkeypatch):
    document = tmp_path / "parity.md"
    document.write_text(f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n")
    monkeypatch.setattr(parity, "rows", lambda only: [("a", "b", "1", "0", "0", "c")])
    parity.main(["--write", str(document)])
    lines = document.read_text().splitlines()
    assert lines[:2] == ["before", parity.BEGIN] and lines[-2:] == [parity.END, "after"]
    assert lines[4] == "| a | b | 1 | 0 | 0 | c |" and "old" not in lines


def test_a_part_of_the_table_is_printed(capsys):
    parity.main(["--only", "loss_scl"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert "loss_scl" in cells[2] and float(cells[4]) < 1e-5 and float(cells[5]) < 1e-8


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "loss_*", "--write", "docs/parity.md"], "--write needs the whole one"),
        (["--only", "los_scl"], "--only=los_scl matches none of anomaly_map, "),
        (["--golden", "nowhere"], "nowhere/index.json does not exist"),
    ],
)
def test_a_table_that_would_be_wrong_is_refused(words, complaint, capsys, monkeypatch):
    monkeypatch.setenv(parity.goldens.VARIABLE, "")  # main sets it; this takes it back
    with pytest.raises(SystemExit):
        parity.main(words)
    assert complaint in capsys.readouterr().err


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        parity.replaced("no markers", "| table |")


def test_the_published_table_has_a_row_for_every_golden():
    measured = DOCUMENT.read_text().partition(parity.BEGIN)[2].partition(parity.END)[0]
    for name in parity.goldens.index(parity.goldens.OWN):
        assert f"| {name} |" in measured, name
