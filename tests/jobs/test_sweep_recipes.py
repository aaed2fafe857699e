"""The sweeps that come with axicon: every combination of their spaces is a recipe that its verb takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jobs import sweep_plan
from jobs.command import read_file
from jobs.sweep_plan import Plan
from jobs.sweep_recipe import SweepRecipe
from tests.conftest import ROOT
from tests.evaluate.tiny import make_tokenizer, save_model

SHIPPED = sorted(path for path in (ROOT / "recipes").glob("sweep_*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_tokenizer())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_all_that_a_shipped_sweep_draws_is_a_recipe(path: Path, tiny: Path, tmp_path: Path) -> None:
    values = read_file(path)
    words = [f"out={tmp_path}"] + ([f"model={tiny}"] if "model" in values["base"] else [])
    plan = Plan.of(SweepRecipe.parse(words, **values))
    seen: dict[str, set[str]] = {one.key: set() for one in plan.space.parameters}
    for seed in range(200):
        settings = plan.space.drawn(random.Random(seed))
        _, problem = plan.trial_recipe(settings, tmp_path)
        assert problem is None, settings
        for key, value in settings.items():
            seen[key].add(str(value))
        plan.full_recipe(settings)
    for one in plan.space.parameters:
        assert one.kind != "choice" or len(seen[one.key]) == len(one.values), (
            f"{one.key} is never all it may be"
        )


def test_a_compression_that_names_no_text_is_measured_on_one_that_the_model_writes(
    tiny: Path, tmp_path: Path
) -> None:
    values = read_file(ROOT / "recipes" / "sweep_compress.yaml")
    words = [f"out={tmp_path}", f"model={tiny}"]
    plan = Plan.of(SweepRecipe.parse(words, **values))
    assert plan.base["text"] == str(tmp_path / sweep_plan.TEXT)
    assert plan.base["window"] == 64, "as many positions as the model knows"
    given = Plan.of(SweepRecipe.parse([*words, "base.text=x.txt"], **values))
    assert given.base["text"] == "x.txt"
    assert not given.writes_text
