import json
import re
import threading
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from ccl_jax import figures, report
from ccl_jax.metrics.scores import IMAGE_METRICS, METRICS, PIXEL_METRICS


def a_class(value, n_normal=20, n_anomalous=10, without=()):
    values = {metric: None if metric in without else value for metric in METRICS}
    return {"n_normal": n_normal, "n_anomalous": n_anomalous, **values}


def summary(classes=None, reasons=None, **changes):
    classes = classes or {"set/wood": a_class(0.9), "set/nut": a_class(0.8)}
    fixed = {
        "step": 160,
        "dataset": "set",
        "conventions": {"aupro_fpr_limit": 0.3, "combine": "add"},
        "provenance": {"seed": 42, "versions": {"jax": "0"}},
    }
    return report.summarize(classes, reasons or {}, **(fixed | changes))


def with_nulls():
    classes = {
        "set/wood": a_class(0.9),
        "set/nut": a_class(0.7, without=PIXEL_METRICS),
        "set/gear": a_class(0.5, n_anomalous=0, without=METRICS),
    }
    reasons = {
        "set/nut": dict.fromkeys(PIXEL_METRICS, "no ground-truth masks"),
        "set/gear": dict.fromkeys(METRICS, "no anomalous test images"),
    }
    return summary(classes, reasons)


def a_panel(size=32, anomalous=True, mask="defect", level=0.1):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    where = np.zeros((size, size), np.uint8)
    if mask == "defect":
        where[:9, 10:20] = 1
    score_map = np.full((size, size), level, np.float32) + 0.2 * where
    return figures.Panel(
        image=picture,
        score_map=score_map,
        mask=None if mask is None else where,
        anomalous=anomalous,
        score=float(score_map.max()),
        caption="hole",
    )


class Page(HTMLParser):
    """The text, links and image sources of a page."""

    def __init__(self, text):
        super().__init__()
        self.words, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_results_have_the_agreed_keys_in_order():
    assert list(summary()) == [
        "step",
        "dataset",
        "conventions",
        "mean",
        "mean_over",
        "reasons",
        "classes",
        "provenance",
    ]
    assert list(summary()["classes"]["set/wood"]) == ["n_normal", "n_anomalous", *METRICS]


def test_mean_is_plain_over_the_classes_that_have_the_metric():
    results = with_nulls()
    assert results["mean"]["image_auroc"] == pytest.approx(0.8)
    assert results["mean"]["pixel_aupro"] == pytest.approx(0.9)
    assert [results["mean_over"][m] for m in ("image_auroc", "pixel_aupro")] == [2, 1]


def test_mean_of_a_metric_that_no_class_has_is_null_over_zero():
    why = dict.fromkeys(METRICS, "no anomalous test images")
    results = summary({"set/a": a_class(0.5, without=METRICS)}, {"set/a": why})
    assert results["mean"] == dict.fromkeys(METRICS)
    assert results["mean_over"] == dict.fromkeys(METRICS, 0)
    assert "nan" not in report.markdown_table(results)


def test_a_null_without_a_reason_raises():
    with pytest.raises(ValueError, match="pixel_auroc of class set/nut is null without a reason"):
        summary({"set/nut": a_class(0.7, without=PIXEL_METRICS)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.2])
def test_values_outside_the_unit_interval_raise_and_name_the_class(bad):
    with pytest.raises(ValueError, match="image_auroc of class set/nut is"):
        summary({"set/nut": a_class(bad)})


def test_missing_metric_or_convention_raises():
    with pytest.raises(ValueError, match="set/nut lack image_f1_max"):
        summary({"set/nut": {k: v for k, v in a_class(0.5).items() if k != "image_f1_max"}})
    with pytest.raises(ValueError, match="aupro_fpr_limit"):
        summary(conventions={})


def test_table_has_a_row_per_class_a_bold_mean_and_footnotes():
    table, *notes = report.markdown_table(with_nulls()).split("\n\n")
    lines = table.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 2 + 3 + 1 and len({len(line) for line in lines}) == 1
    assert cells[2] == ["wood", "20", "10", *["0.900"] * 7]
    assert cells[3] == ["nut", "20", "10", *["0.700"] * 3, *["-¹"] * 4]
    assert cells[4] == ["gear", "20", "0", *["-²"] * 7]
    assert cells[5] == ["**mean**", "", "", *["**0.800³**"] * 3, *["**0.900⁴**"] * 4]
    assert notes[:4] == [
        "¹ no ground-truth masks",
        "² no anomalous test images",
        "³ mean over 2 of 3 classes",
        "⁴ mean over 1 of 3 classes",
    ]


def test_results_of_parts_stand_beside_those_of_images_where_there_are_any():
    parts = {
        "iad/nut": a_class(0.8) | {"sample_auroc": 0.9},
        "iad/toy": a_class(0.8) | {"sample_auroc": None},
        "set/wood": a_class(0.8),
    }
    with pytest.raises(ValueError, match="sample_auroc of class iad/toy is null without a reason"):
        summary(parts)
    with pytest.raises(ValueError, match=r"sample_auroc of class iad/nut is 1\.2"):
        summary({"iad/nut": a_class(0.8) | {"sample_auroc": 1.2}})
    results = summary(parts, {"iad/toy": {"sample_auroc": "no part without an anomalous view"}})
    assert "sample_auroc" not in results["classes"]["set/wood"]
    assert (results["mean"]["sample_auroc"], results["mean_over"]["sample_auroc"]) == (0.9, 1)
    table, *notes = report.markdown_table(results).split("\n\n")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")][-1] for line in table.split("\n")
    ]
    assert cells[0] == "S-AUROC" and cells[2:] == ["0.900", "-¹", "", "**0.900²**"]
    assert notes[0] == "¹ no part without an anomalous view" and "S: per part" in notes[-1]
    assert "S-AUROC" not in report.markdown_table(summary())


def test_table_keeps_the_dataset_where_there_are_several_and_escapes_bars():
    table = report.markdown_table(summary({"a/nut": a_class(0.5), "b/n|ut": a_class(0.5)}))
    assert "| a/nut " in table and "| b/n\\|ut " in table


def test_written_results_read_back_and_no_draft_is_left(tmp_path):
    results = with_nulls()
    folder = tmp_path / "evaluation" / "160"
    report.write_results(folder, results)
    report.write_results(folder, results)
    assert json.loads((folder / "results.json").read_text()) == results
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "results.json", "results.md"]
    text = (folder / "results.md").read_text()
    assert text.startswith("# set, step 160\n\n| class") and "- combine: `add`" in text


def test_results_that_json_cannot_hold_leave_the_old_ones_alone(tmp_path):
    report.write_results(tmp_path, summary())
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_results(tmp_path, summary(provenance={"loss": float("nan")}))
    assert (tmp_path / "results.json").read_bytes() == before


def test_page_links_every_sheet_and_loads_nothing_from_elsewhere(tmp_path):
    classes = {"set/metal nut #1": a_class(0.9), "set/wood": a_class(0.8)}
    figures.class_sheet(report.sheet_path(tmp_path, "set/metal nut #1"), "nut", [a_panel()])
    report.write_results(tmp_path, summary(classes))
    page = Page((tmp_path / "report.html").read_text())
    assert page.links and all((tmp_path / unquote(link)).is_file() for link in page.links)
    assert not re.search(r"https?:|<script|<link", (tmp_path / "report.html").read_text())
    assert page.tags.count("img") == 1 and page.tags.count("tr") == 4


def test_page_shows_names_as_text(tmp_path):
    name = "set/<b>nut & co"
    report.write_results(tmp_path, summary({name: a_class(0.9)}))
    page = Page((tmp_path / "report.html").read_text())
    assert "<b>nut & co" in "".join(page.words) and "b" not in page.tags


def test_page_and_markdown_show_diagnostics_where_there_are_any(tmp_path):
    results = summary() | {"diagnostics": {"neck_v_measure": 0.75}}
    report.write_results(tmp_path, results)
    assert "neck_v_measure: `0.75`" in (tmp_path / "results.md").read_text()
    assert "neck_v_measure" in (tmp_path / "report.html").read_text()


def test_page_and_markdown_show_the_tables_of_published_conventions(tmp_path):
    convention = {
        "description": "fifty strips, from counts",
        "mean": {"pixel_ap": 0.625, "pixel_aupro": None},
        "classes": {
            "set/w|ood": {"pixel_ap": 0.75, "pixel_aupro": None},
            "set/<b>nut": {"pixel_ap": 0.5, "pixel_aupro": None},
        },
    }
    results = summary() | {"published_conventions": {"adeval_50": convention}}
    report.write_results(tmp_path, results)
    text = (tmp_path / "results.md").read_text()
    exact, published = text.split("## Convention adeval_50")
    assert "**0.850**" in exact and exact.count("**mean**") == published.count("**mean**") == 1
    lines = [line.split() for line in published.strip().splitlines()]
    assert lines[0] == ["|", "class", "|", "pixel_ap", "|", "pixel_aupro", "|"]
    assert lines[2] == ["|", "set/w\\|ood", "|", "0.750", "|", "-", "|"]
    assert lines[4] == ["|", "**mean**", "|", "**0.625**", "|", "**-**", "|"]
    assert "fifty strips, from counts" in published
    page = Page((tmp_path / "report.html").read_text())
    words = " ".join(page.words)
    assert page.tags.count("table") == 2 and "Convention adeval_50" in words
    assert "0.625" in words and "fifty strips" in words and "b" not in page.tags


@pytest.mark.parametrize("name", ["../wood", "a/../../wood", "/etc/wood"])
def test_sheets_stay_in_the_figures_folder(tmp_path, name):
    with pytest.raises(ValueError, match="outside of"):
        report.sheet_path(tmp_path, name)


def test_sheet_grows_with_its_panels_and_survives_every_kind(tmp_path):
    panels = [
        a_panel(),
        a_panel(mask=None),
        a_panel(mask="empty"),
        a_panel(anomalous=False, mask="empty"),
    ]
    sizes = []
    for number in (1, 4):
        path = tmp_path / "figures" / f"{number}.png"
        figures.class_sheet(path, "nut $1_2 を <b>", panels[:number])
        with Image.open(path) as sheet:
            sizes.append(sheet.size)
    assert sizes[0][1] == sizes[1][1] and sizes[1][0] > 2 * sizes[0][0]
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["1.png", "4.png"]


def test_sheet_outlines_only_masked_defects(tmp_path):
    outlined = []
    for mask in ("defect", None):
        figures.class_sheet(tmp_path / "sheet.png", "nut", [a_panel(mask=mask)])
        with Image.open(tmp_path / "sheet.png") as sheet:
            pixels = np.asarray(sheet.convert("RGB")).astype(int)
        outlined.append((np.abs(pixels - [255, 43, 214]).max(-1) < 12).sum())
    assert outlined[0] > 50 and outlined[1] == 0


def test_sheet_of_constant_maps_and_long_captions_is_drawn(tmp_path):
    panel = a_panel(mask="empty", anomalous=False)
    long = figures.Panel(panel.image, panel.score_map, None, True, 0.1, "x" * 200)
    figures.class_sheet(tmp_path / "sheet.png", "flat", [panel, long])
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_sheet_without_panels_raises(tmp_path):
    with pytest.raises(ValueError, match="no test image"):
        figures.class_sheet(tmp_path / "sheet.png", "nut", [])


def test_overlay_runs_from_blue_to_red_and_clips():
    image = np.full((1, 4, 3), 128, np.uint8)
    scores = np.array([[-5.0, 0.2, 0.8, 9.0]])
    low, at_low, at_high, high = figures.overlay(image, scores, 0.2, 0.8)[0].astype(int)
    assert (low == at_low).all() and (high == at_high).all()
    assert low[2] > low[0] and high[0] > high[2] + 50


def test_overlay_of_a_constant_map_is_finite_and_of_another_size_raises():
    image = np.zeros((4, 4, 3), np.uint8)
    assert figures.overlay(image, np.full((4, 4), 0.5), 0.5, 0.5).dtype == np.uint8
    with pytest.raises(ValueError, match="cannot be laid over"):
        figures.overlay(image, np.zeros((5, 4)), 0.0, 1.0)


def test_metric_names_are_the_seven_of_the_design():
    assert (*IMAGE_METRICS, *PIXEL_METRICS) == METRICS
    assert len(METRICS) == 7


def test_two_evaluations_of_one_run_write_one_after_the_other(tmp_path):
    order = []

    def other():
        with report.writing(tmp_path / "evaluation/5"):
            order.append("second")

    thread = threading.Thread(target=other)
    with report.writing(tmp_path / "evaluation/4"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_results_json_comes_last_so_that_it_marks_a_complete_evaluation(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "_html", fails)
    with pytest.raises(OSError, match="no space"):
        report.write_results(tmp_path, summary())
    assert (tmp_path / "results.md").exists() and not (tmp_path / "results.json").exists()
