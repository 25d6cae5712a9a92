import jax
import numpy as np
import pytest

from ccl_jax.models.initial import Draws, kaiming_normal, torch_bias, torch_kernel

KEY = jax.random.key(0)


@pytest.mark.parametrize("reserve", [0, 30_000])
def test_draws_have_the_asked_distribution(reserve):
    draws = Draws(KEY, reserve=reserve)
    normal = np.asarray(draws.normal((50, 200), 3.0))
    uniform = np.asarray(draws.uniform((50, 200), 0.5))
    assert normal.mean() == pytest.approx(0, abs=0.1)
    assert normal.std() == pytest.approx(3, rel=0.03)
    assert np.abs(normal).max() < 3 * 6
    assert uniform.std() == pytest.approx(0.5 / np.sqrt(3), rel=0.03)
    assert 0.499 < np.abs(uniform).max() <= 0.5
    assert draws.used == 20_000


@pytest.mark.parametrize("reserve", [0, 100, 250, 300])
def test_no_number_is_handed_out_twice(reserve):
    draws = Draws(KEY, reserve=reserve)
    numbers = np.concatenate([np.asarray(draws.uniform((100,), 1.0)) for _ in range(3)])
    assert np.unique(numbers).size == numbers.size


def test_the_same_key_gives_the_same_numbers_and_another_key_others():
    first, again, other = (Draws(key).uniform((9,), 1.0) for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert not np.any(np.isclose(first, other))


def test_fans_are_pytorchs():
    draws = Draws(KEY)
    shape = (3, 3, 16, 64)
    assert np.std(kaiming_normal(draws, shape)) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert np.abs(torch_kernel(draws, shape)).max() == pytest.approx(1 / 12, rel=0.01)
    bias = torch_bias(draws, shape)
    assert bias.shape == (64,)
    assert np.abs(bias).max() == pytest.approx(1 / 12, rel=0.1)
