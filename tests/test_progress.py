import io

import pytest

from ccl_jax import progress


@pytest.mark.parametrize("shown", [True, False])
def test_test_images_are_counted_beside_a_bar_where_one_is_wanted(capsys, shown):
    assert list(progress.over_images(iter("abc"), 10, 4, shown=shown)) == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert ("scoring" in err and "/10" in err) == shown
    assert bool(err) == shown


def test_a_callback_draws_from_its_first_call_to_the_last(capsys):
    count = progress.callback("reading", "image", shown=True)
    assert capsys.readouterr().err == ""
    count(1, 3)
    assert "reading" in capsys.readouterr().err
    count(3, 3)
    assert "3/3" in capsys.readouterr().err


def test_no_callback_where_no_bar_is_wanted():
    assert progress.callback("reading", "image", shown=False) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_gets_two_states_of_a_short_bar_and_a_terminal_nearly_all(monkeypatch, terminal):
    err = io.StringIO()
    monkeypatch.setattr(err, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", err)
    seconds = iter(range(100))
    with progress.new_bar(10, "image", shown=True) as bar:
        bar._time = lambda: next(seconds)
        bar.start_t = bar.last_print_t = 0
        for _ in range(10):
            bar.update()
    states = {state.split("[")[0] for state in err.getvalue().split("\r") if "/10" in state}
    assert bar.maxinterval >= bar.mininterval == (0.5 if terminal else progress.SELDOM)
    assert len(states) in (range(9, 12) if terminal else [2])
