"""What is wrong with a config, collected setting by setting."""

from collections.abc import Callable
from typing import Any

from ccl_jax.config import ConfigDict, flatten


class Problems:
    """Collects what is wrong with a config, so that all of it is told at once."""

    def __init__(self, config: ConfigDict) -> None:
        self.values = dict(flatten(config))
        self.lines: list[str] = []

    def check(self, key: str, good: Callable[[Any], bool], needs: str, example: Any) -> None:
        """Notes setting `key` unless `good` holds for its value."""
        if key not in self.values:
            self.lines.append(
                f"config.{key} is missing, perhaps because another version of ccl_jax wrote this "
                f"config; add it to the file as in configs/default.py, e.g. with {example!r}"
            )
        elif not good(self.values[key]):
            value = self.values[key]
            self.lines.append(
                f"config.{key}={value!r} must be {needs}, e.g. --config.{key}={example}"
            )

    def choice(self, key: str, *allowed: Any) -> None:
        """The value is one of `allowed`."""
        self.check(
            key, lambda v: v in allowed, f"one of {', '.join(map(repr, allowed))}", allowed[0]
        )

    def integer(self, key: str, least: int, example: int) -> None:
        """The value is a whole number, at least `least`."""
        self.check(key, lambda v: is_integer(v) and v >= least, f"an integer >= {least}", example)

    def number(
        self, key: str, low: float, high: float, example: float, *, above: bool = False
    ) -> None:
        """The value is a number in [low, high], or in (low, high] where `above`."""
        bracket = "(" if above else "["
        self.check(
            key,
            lambda v: is_number(v) and low <= v <= high and not (above and v == low),
            f"a number in {bracket}{low:g}, {high:g}]",
            example,
        )

    def interval(self, key: str, low: float, high: float, example: tuple[float, float]) -> None:
        """The value is a pair (from, to) with low < from <= to <= high."""
        self.check(
            key,
            lambda v: len(v) == 2 and all(map(is_number, v)) and low < v[0] <= v[1] <= high,
            f"two numbers with {low:g} < first <= second <= {high:g}",
            f"'{example}'",
        )


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (True and False are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
