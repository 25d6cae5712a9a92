"""Signals become flags, exceptions or votes, and all processes stop after the same step."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import loop, mesh
from ccl_jax.loop import Vote, check_together
from ccl_jax.signals import SIGNALS, Stopped, StopRequest


def send(name):
    os.kill(os.getpid(), signal.Signals[name])


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_that_may_be_chosen_is_noted_and_its_handler_comes_back(name):
    before = signal.getsignal(signal.Signals[name])
    with StopRequest(SIGNALS) as stop:
        stop.check()
        send(name)
        assert stop.signal is signal.Signals[name]
        assert signal.getsignal(signal.Signals[name]) is before, "a second one acts as usual"
        with pytest.raises(Stopped, match=f"^{name}: saved step 3 of 4$"):
            stop.check("saved step 3 of 4")


def test_a_signal_ends_at_once_where_nothing_is_to_be_saved():
    reached = []
    with StopRequest(["SIGUSR1"]) as stop:
        with pytest.raises(Stopped) as stopped, stop.at_once():
            reached.append("in")
            send("SIGUSR1")
            reached.append("after")
        assert reached == ["in"] and stopped.value.signal is signal.SIGUSR1
        with pytest.raises(Stopped), stop.at_once():  # one that came before
            reached.append("again")
        assert reached == ["in"]


def test_one_process_asks_only_itself_and_its_steps_carry_nothing():
    stop = StopRequest()
    vote = Vote(stop, mesh.make_mesh())
    assert vote.ballot() is None and Vote.count(None) is None
    vote.add(None)
    assert not vote.decided()
    stop.signal = signal.SIGINT
    assert vote.decided()


def test_of_several_processes_all_stop_after_the_step_whose_votes_say_so(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stop = StopRequest()
    vote = Vote(stop, mesh.make_mesh())
    count = jax.jit(Vote.count)
    vote.add(count(vote.ballot()))
    assert not vote.decided()
    others = mesh.put_batch({"ballot": np.array([0, 0, 15, 0], np.int32)}, mesh.make_mesh())
    vote.add(count(others["ballot"]))
    assert not vote.decided(), "that step may still compute"
    stop.signal = signal.SIGINT  # too late for the step before
    vote.add(count(vote.ballot()))
    assert vote.decided() and stop.signal is signal.SIGTERM, "what all read, not its own"


def test_the_ballot_holds_the_signal_of_this_process_once_for_each_of_its_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stop = StopRequest()
    vote = Vote(stop, mesh.make_mesh())
    np.testing.assert_array_equal(vote.ballot(), np.zeros(4))
    stop.signal = signal.SIGTERM
    np.testing.assert_array_equal(vote.ballot(), np.full(4, 15))
    assert vote.ballot().dtype == jnp.int32


@pytest.mark.parametrize(("own", "other"), [(0, 15), (15, 0), (10, 15), (0, 0)])
def test_between_steps_all_processes_hear_of_a_signal_to_any(monkeypatch, own, other):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def sum_with_the_other(received):
        assert received.sum() == 1 and received[own] == 1
        theirs = np.zeros_like(received)
        theirs[other] = 1
        return received + theirs

    monkeypatch.setattr(loop.mesh, "sum_over_processes", sum_with_the_other)
    stop = StopRequest()
    stop.signal = signal.Signals(own) if own else None
    if own == other == 0:
        check_together(stop, "")
    else:
        with pytest.raises(Stopped, match="SIGTERM: saved"):
            check_together(stop, "saved")


def test_a_signal_that_comes_while_the_processes_ask_each_other_counts_the_next_time(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def sum_during_which_a_signal_comes(received):
        if stop.signal is None:
            send("SIGUSR1")
        return received * 2

    monkeypatch.setattr(loop.mesh, "sum_over_processes", sum_during_which_a_signal_comes)
    with StopRequest(["SIGUSR1"]) as stop:
        check_together(stop, "")
        with pytest.raises(Stopped, match="SIGUSR1: saved"):
            check_together(stop, "saved")
