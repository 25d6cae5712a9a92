"""Score maps are those of the original code, in every way that it combines scales."""

import pytest

from tests.reference import goldens
from tests.reference.compare_scores import map_differences

# The reference README allows float32 maps 1e-5. In float64 only the order of sums differs.
TOLERANCE = {False: 1e-5, True: 1e-12}


@pytest.mark.parametrize("f64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", goldens.names("anomaly_map*"))
def test_every_recorded_score_map_is_reproduced(name, f64):
    found = map_differences(name, f64=f64)
    assert any(key.startswith("amap_add_s") for key in found)
    assert {key: value for key, value in found.items() if not value <= TOLERANCE[f64]} == {}


def test_the_recorded_score_maps_are_there():
    assert (goldens.OWN / "anomaly_map.npz").is_file()
