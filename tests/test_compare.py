import json

import pytest

from ccl_jax.compare import comparison_table, main


def write_run(workdir, step, image, measure=0.5):
    folder = workdir / "evaluation" / str(step)
    folder.mkdir(parents=True)
    mean = dict.fromkeys(("image_ap", "pixel_auroc", "pixel_ap"), 0.5) | {
        "image_auroc": image,
        "pixel_aupro": None,
    }
    results = {"mean": mean, "diagnostics": {"neck_v_measure": measure}}
    (folder / "results.json").write_text(json.dumps(results))


def test_mean_and_spread_over_the_newest_results_of_each_run(tmp_path, capsys):
    write_run(tmp_path / "a-0", 9, 0.1)
    write_run(tmp_path / "a-0", 10, 0.7)
    write_run(tmp_path / "a-1", 10, 0.9)
    assert main([f"A={tmp_path}/a-*"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| A | 2 | 0.800 ± 0.141 |")
    assert "| - |" in row  # AUPRO, which the runs lack


def test_a_pattern_without_runs_and_a_run_without_results_are_errors(tmp_path, capsys):
    assert main([f"A={tmp_path}/none-*"]) == 2
    assert "matches no folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="evaluate it first"):
        comparison_table({"A": [tmp_path]})
