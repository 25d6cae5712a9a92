"""A training that is killed again and again ends as if nobody had disturbed it."""

import pytest

from tests import campaign


@pytest.mark.slow
def test_five_kills_change_no_bit_of_the_last_state(tmp_path, capsys):
    assert campaign.campaign(tmp_path / "campaign", kills=5, per_round=5, seed=1) == 0
    said = capsys.readouterr().out
    assert said.count("equal, bit for bit") >= 1
    assert "\n5 kills in " in said
