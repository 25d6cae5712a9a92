"""The command that compares our loader with PyTorch's, on a few images."""

import pytest
from conftest import write_photos
from test_main import tiny

from ccl_jax.main import main

pytest.importorskip(
    "tests.reference.live_torchvision",
    reason="needs torch and torchvision that can be imported: pip install -e '.[reference]'",
    exc_type=ImportError,
)


@pytest.mark.slow
def test_every_way_to_read_is_timed_and_compared_with_pytorch(tmp_path, capsys):
    from tests.reference import loader_speed

    photos = tmp_path / "photos"
    write_photos(photos)
    for images in ("original", "resized"):
        settings = {"data.source": "prepared", "data.prepared_images": images}
        words = tiny(photos, "unused", **settings, **{"data.prepared": tmp_path / images})
        assert main([*words, "--job=prepare"]) == 0
    output = tmp_path / "loader.md"
    words = [str(photos), f"--prepared={tmp_path}/original", f"--resized={tmp_path}/resized"]
    words += ["--size=64", "--batch=4", "--readers", "1", "--seconds=0.2", "--rounds=1"]
    loader_speed.main([*words, f"--output={output}"])
    rows = [line.split("|")[1:-1] for line in output.read_text().splitlines() if "| ours" in line]
    assert [row[0].strip() for row in rows] == [
        *(f"ours, {source}" for source in ("folder", "prepared", "resized") for _ in range(2)),
        "ours, cached",
        *(
            f"ours, {source}, and second view"
            for source in ("folder", "prepared", "resized", "cached")
        ),
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
