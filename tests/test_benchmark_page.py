"""The page of measured speeds: what is run again takes its own place, and no other."""

import jax

from ccl_jax.benchmark.page import HEAD, machine, replace_part


def test_a_part_is_added_replaced_and_leaves_the_others_as_they_are(tmp_path):
    page = tmp_path / "benchmarks.md"
    replace_part(page, "CPU", "Training", "fast\n")
    assert page.read_text() == f"{HEAD}\n## CPU\n\n### Training\n\nfast\n"
    replace_part(page, "GPU", "Training", "faster")
    replace_part(page, "CPU", "Metrics", "| a |\n|---|\n")
    replace_part(page, "CPU", "Training", "slow")
    expected = (
        f"{HEAD}\n## CPU\n\n### Training\n\nslow\n\n### Metrics\n\n| a |\n|---|\n"
        "\n## GPU\n\n### Training\n\nfaster\n"
    )
    assert page.read_text() == expected
    replace_part(page, "GPU", "Training", "faster")
    assert page.read_text() == expected


def test_words_that_somebody_wrote_between_stay(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Speed\n\nBy hand.\n\n## CPU\n\nAlso by hand.\n")
    replace_part(page, "CPU", "Training", "fast")
    assert (
        page.read_text()
        == "# Speed\n\nBy hand.\n\n## CPU\n\nAlso by hand.\n\n### Training\n\nfast\n"
    )


def test_machine_names_the_cores_or_the_devices(monkeypatch):
    assert machine().startswith("CPU, ") and " cores (" in machine()

    class Device:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Device()] * 8)
    assert machine() == "8 x NVIDIA H100 80GB HBM3"
