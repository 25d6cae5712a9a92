"""Deterministic programs are asked for before a device is used, and not against the user's word."""

import pytest

from ccl_jax import determinism, setup


@pytest.fixture
def flags(monkeypatch):
    """Sets XLA_FLAGS, which this process has read long ago."""

    def set_flags(text: str) -> None:
        monkeypatch.setenv("XLA_FLAGS", text)

    return set_flags


def test_flag_is_added_to_those_that_are_there_and_only_once(flags, monkeypatch):
    flags("--xla_dump_to=/tmp/x")
    for _ in range(2):
        determinism.ask_for_it()
        assert determinism.os.environ["XLA_FLAGS"] == (
            "--xla_dump_to=/tmp/x --xla_gpu_deterministic_ops=true"
        )
    monkeypatch.delenv("XLA_FLAGS")
    determinism.ask_for_it()
    assert determinism.os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"


def test_flag_that_says_the_contrary_is_refused(flags):
    flags("--xla_gpu_deterministic_ops=false")
    with pytest.raises(ValueError, match=r"config\.run\.deterministic=True, but XLA_FLAGS="):
        determinism.ask_for_it()


@pytest.mark.parametrize("wanted", [True, False])
def test_every_job_asks_for_it_before_it_joins_the_others(flags, monkeypatch, tiny_config, wanted):
    class JoinedError(Exception):
        pass

    def join(*_, **__):
        raise JoinedError(determinism.os.environ["XLA_FLAGS"])

    flags("")
    monkeypatch.setattr(setup.mesh, "initialize_distributed", join)
    tiny_config.run.deterministic = wanted
    with pytest.raises(JoinedError) as caught:
        setup.devices_of(tiny_config)
    assert str(caught.value) == ("--xla_gpu_deterministic_ops=true" if wanted else "")
