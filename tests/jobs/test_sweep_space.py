"""Spaces: which settings there are, under which conditions, and the line a mistake gets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.settings import parse_overrides
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_space import Space, applied
from tests.jobs.toy import Toy, known

BASE: dict[str, Any] = {"n": 3, "method": {"method": "round", "digits": 4}, "chain": []}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    return known(monkeypatch)


def space(toy: Toy, asked: dict[str, Any], base: dict[str, Any] | None = None) -> Space:
    return Space.of(SweepRecipe.parse(space=asked).space, toy.verb(), base or BASE)


def test_a_setting_counts_only_with_a_method_that_has_it(toy: Toy) -> None:
    found = space(toy, {"method": ["round", "cut"], "method.at": [0.1, 0.2], "method.digits": [1, 2]})
    grid = list(found.grid())
    assert len(grid) == 2 + 2 * 2
    assert [one for one in grid if one["method"] == "round"] == [
        {"method": "round", "method.digits": 1}, {"method": "round", "method.digits": 2}
    ]  # fmt: skip
    assert all("method.at" in one for one in grid if one["method"] == "cut")


def test_a_chain_is_a_choice_and_its_methods_are_named(toy: Toy) -> None:
    found = space(
        toy, {"chain": ["round", "cut,round"], "chain.cut.at": [0.1, 0.2], "chain.round.digits": [5]}
    )
    grid = list(found.grid())
    assert [one["chain"] for one in grid] == ["round", "cut,round", "cut,round"]
    assert applied(BASE, grid[1])["chain"] == [
        {"method": "cut", "at": 0.1}, {"method": "round", "digits": 5}
    ]  # fmt: skip


def test_written_conditions_hold_in_any_order(toy: Toy) -> None:
    asked = {"inner.rate": {"choice": [0.1, 0.2], "when": {"x": [1, 2]}}, "x": [1, 2, 3], "n": [1]}
    grid = list(space(toy, asked).grid())
    assert len(grid) == 2 + 2 + 1
    assert {"x": 3, "n": 1} in grid


def test_another_method_takes_nothing_of_the_base_s_method() -> None:
    assert applied(BASE, {"method.method": "cut", "method.at": 1})["method"] == {"method": "cut", "at": 1}
    assert applied(BASE, {"method.digits": 1})["method"] == {"method": "round", "digits": 1}
    assert BASE["method"] == {"method": "round", "digits": 4}


def test_rules_of_some_products_are_settings_too(toy: Toy) -> None:
    key = "chain.cut.rules.blocks.[0-4].*.digits"
    found = space(toy, {"chain": ["cut"], key: [3]})
    [settings] = found.grid()
    assert applied(BASE, settings)["chain"] == [{"method": "cut", "rules": {"blocks.[0-4].*": {"digits": 3}}}]
    with pytest.raises(AxiconError, match="did you mean"):
        space(toy, {"chain": ["cut"], key.replace("digits", "digit"): [3]})


def test_draws_are_within_their_ends_and_even_in_the_logarithm(toy: Toy) -> None:
    asked = {"x": {"log_uniform": [1e-4, 1]}, "n": {"integer": [1, 3]}, "inner.rate": {"uniform": [2, 3]}}
    found = space(toy, asked)
    draws = [found.drawn(random.Random(seed)) for seed in range(400)]
    assert {one["n"] for one in draws} == {1, 2, 3}
    assert all(2 <= one["inner.rate"] <= 3 for one in draws)
    # Half of them lie below the middle of the logarithms; 400 fair coins leave 150 to 250 once in 2 million.
    assert 150 < sum(one["x"] < 1e-2 for one in draws) < 250


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"y": [1]}, "space: unknown key 'y': "),
        ({"inner.rat": [1]}, "space: unknown key 'inner.rat': did you mean 'inner.rate'?"),
        ({"inner": [1]}, "space.inner: it has settings of its own, such as inner.rate"),
        ({"x.y": [1]}, "space: unknown key 'x.y': x has no y"),
        ({"method.digit": [1]}, "space: unknown key 'method.digit': did you mean 'method.digits'?"),
        ({"chain": ["cut"], "chain.round.digits": [1]}, "space: unknown key 'chain.round': did you mean"),
        (
            {"x": {"choice": [1], "when": {"m": 1}}},
            "space.x: when names no parameter: unknown key 'm': known",
        ),
        (
            {"x": {"choice": [1], "when": {"n": 1}}, "n": {"choice": [1], "when": {"x": 1}}},
            "space.x: its condition depends on itself",
        ),
        ({"x": {"uniform": [2, 1]}}, "space.x=.*uniform: the first number must be below the second"),
        ({"x": {"log_uniform": [0, 1]}}, "space.x=.*log_uniform: both numbers must be above 0"),
        ({"x": {"choice": [1], "uniform": [1, 2]}}, "space.x=.*give one of choice, uniform, log_uniform"),
        ({}, "space: names nothing to vary"),
    ],
)
def test_a_mistake_is_one_line(toy: Toy, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(AxiconError, match=f"^{says}"):
        space(toy, asked)


def test_a_grid_takes_no_ranges_of_real_numbers(toy: Toy) -> None:
    found = space(toy, {"x": {"uniform": [0, 1]}, "n": {"integer": [1, 3]}})
    with pytest.raises(AxiconError, match=r"space.x: a grid takes lists of values, not uniform"):
        list(found.grid())


def test_words_of_a_command_line_make_the_same_space(tmp_path: Path) -> None:
    words = ["space.inner.rate.log_uniform=[1e-5,1]", "space.n=1,2", "base.n=2", "full.inner.rate=3"]
    found = SweepRecipe.parse(words, verb="toy", base="x.yaml", space={"n": [7]})
    assert found.space["inner.rate"].log_uniform == (1e-5, 1.0)
    assert found.space["n"].choice == ("1", "2")
    assert found.base == {"recipe": "x.yaml", "n": "2"}
    assert found.full == {"inner.rate": "3"}
    assert parse_overrides(["a.b=1"]) == {"a": {"b": "1"}}
