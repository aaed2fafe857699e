"""Population based training: members that go on from each other's ends, whatever kills the sweep between."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from axicon.errors import AxiconError, RunFailed
from axicon.settings import Recipe
from jobs import finetune, sweep, sweep_ledger, sweep_verbs
from jobs.command import read_file
from jobs.finetune_recipe import FinetuneRecipe
from jobs.progress import Reporter
from jobs.report import Report
from jobs.sweep_plan import Plan
from jobs.sweep_population import explored
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_space import Parameter, Space
from jobs.sweep_study import Study
from jobs.sweep_verbs import GoesOn, Verb
from tests.jobs.test_sweep import Killed, torn
from tests.jobs.toy import known, one_by_one
from tests.services.tiny import tiny_model


class WalkRecipe(Recipe):
    x: float = Field(0.1, description="share of the way to 0 of a step")
    shape: int = Field(1, description="what cannot change")
    steps: int = Field(12, description="in all")
    start_from: Path | None = Field(None, description="another walk")
    kind: str = Field("constant", description="of a schedule")
    threads: int | None = Field(None, description="of compute")
    out: Path | None = Field(None, description="folder")


class Walks:
    """A verb that goes from 1 towards 0; beyond x = 0.5 it goes away from it."""

    def __init__(self) -> None:
        self.runs: list[WalkRecipe] = []
        self.dies: set[int] = set()
        """Runs, counted from 0, that are killed."""
        self.fails: Any = lambda recipe: False

    def run(self, recipe: WalkRecipe, reporter: Reporter) -> Report:
        self.runs.append(recipe)
        if len(self.runs) - 1 in self.dies:
            raise Killed
        if self.fails(recipe):
            raise AxiconError("it failed")
        begun, at = 0, 1.0
        if recipe.start_from is not None:
            begun, at = json.loads((recipe.start_from / "at").read_text())
        for _ in range(begun, recipe.steps):
            at *= 1 - recipe.x if recipe.x <= 0.5 else recipe.x + 0.6
        reporter.figures(recipe.steps, {"loss": at})
        assert recipe.out is not None
        recipe.out.mkdir(parents=True, exist_ok=True)
        (recipe.out / "at").write_text(json.dumps([recipe.steps, at]))
        return Report(verb="walk", recipe=recipe, metrics={"loss": at}, seconds=0.0, files=())

    def verb(self) -> Verb:
        return Verb(
            name="walk",
            recipe=WalkRecipe,
            run=self.run,
            tables={},
            objectives={"loss": "min"},
            has_steps=True,
            goes_on=GoesOn(
                start="start_from",
                steps="steps",
                varies=("x",),
                fixed={},
                needs={"start_from": (None, "sets it"), "kind": ("constant", "knows no end")},
            ),
        )


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Walks:
    found = Walks()
    monkeypatch.setitem(sweep_verbs.VERBS, "walk", found.verb)
    return found


def recipe(out: Path, **settings: Any) -> SweepRecipe:
    values: dict[str, Any] = {
        "verb": "walk", "base": {"shape": 3}, "space": {"x": {"uniform": [0.01, 0.6]}}, "trials": 4,
        "scheduler": "pbt", "pbt": {"interval": 5}, "out": out,
    }  # fmt: skip
    return SweepRecipe.parse(**values | settings)


def swept(out: Path, said: io.StringIO | None = None, **settings: Any) -> Report:
    return sweep.run(recipe(out, **settings), Reporter(said or io.StringIO()), one_by_one)


def told(report: Report) -> list[tuple[Any, ...]]:
    """What there is of each trial but for when it ran."""
    kept = ("trial", "status", "settings", "metrics", "parent", "recipe_sha256")
    return [tuple(one[key] for key in kept) for one in report.details["trials"]]


def test_the_worst_go_on_from_the_best_with_settings_near_theirs(walks: Walks, tmp_path: Path) -> None:
    report = swept(tmp_path / "s", full={"steps": 20})
    trials = report.details["trials"]
    assert [(one.steps, one.shape) for one in walks.runs] == [(5, 3)] * 4 + [(10, 3)] * 4 + [(12, 3)] * 4
    by_number = {one["trial"]: one for one in trials}
    copied = 0
    for generation in (1, 2):
        last, now = trials[4 * generation - 4 : 4 * generation], trials[4 * generation : 4 * generation + 4]
        order = sorted(last, key=lambda one: (one["metrics"]["loss"], one["trial"]))
        for own, one in zip(last, now, strict=True):
            parent, run = by_number[one["parent"]], walks.runs[int(one["trial"]) - 1]
            assert run.start_from == tmp_path / "s" / "trials" / parent["trial"]
            assert [step["step"] for step in one["steps"]] == [run.steps]
            if own is order[-1]:  # a quarter of four members
                copied += parent is not own
                assert parent is order[0]
                assert one["settings"] != parent["settings"]
                assert 0.01 <= one["settings"]["x"] <= 0.6
            else:
                assert parent is own
                assert one["settings"] == own["settings"]
    assert copied == 2
    best = by_number[report.details["best"]]
    assert best["metrics"]["loss"] == min(one["metrics"]["loss"] for one in trials)
    [line] = [line for line in sweep.summary(report) if line.startswith("it began from ")]
    assert line == "it began from " + ", which began from ".join(sweep.descent(best["trial"], by_number)[1:])
    full = (tmp_path / "s" / "best.yaml").read_text()
    assert f"start_from: {tmp_path / 's' / 'trials' / best['parent']}" in full
    assert "steps: 20" in full
    assert told(swept(tmp_path / "again", full={"steps": 20})) == told(report)


def test_wherever_it_is_killed_the_same_command_has_the_same_winner(
    walks: Walks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a segment, between two, at the end of a generation, in the middle of a line of the ledger."""
    whole = swept(tmp_path / "whole")
    draw = random.Random(7)
    for attempt, run in enumerate((4, 10)):
        out = tmp_path / f"in-{attempt}"
        walks.runs.clear()
        walks.dies = {run}
        with pytest.raises(Killed):
            swept(out)
        walks.dies = set()
        assert told(swept(out)) == told(whole)
        assert len(walks.runs) == 12 + 1
    for attempt, write in enumerate((2 * 4, 16)):
        out = tmp_path / f"at-{attempt}"
        with monkeypatch.context() as patch:
            patch.setattr(sweep_ledger, "write_all", torn(write, draw.random(), Killed()))
            with pytest.raises(Killed):
                swept(out)
        assert told(swept(out)) == told(whole)
        ends = Counter(
            event["trial"]
            for event in map(json.loads, (out / "ledger.jsonl").read_text().splitlines())
            if event.get("status") == "finished"
        )
        assert set(ends.values()) == {1}


def test_a_generation_begins_when_the_one_before_has_ended(walks: Walks, tmp_path: Path) -> None:
    study = Study(Plan.of(recipe(tmp_path / "s")), print)
    tasks = [study.ask() for _ in range(4)]
    ends = [(task, {"status": "finished", "metrics": {"loss": float(i)}}) for i, task in enumerate(tasks)]
    for task, result in reversed(ends):
        assert study.ask() is None
        assert study.holds
        assert task is not None
        study.told(task["trial"], result)
    following = study.ask()
    assert following is not None
    assert not study.holds
    assert following["recipe"]["start_from"] == str(tmp_path / "s" / "trials" / "0001")
    study.close("stopped")


def test_a_member_that_failed_goes_on_from_one_that_did_not(walks: Walks, tmp_path: Path) -> None:
    walks.fails = lambda recipe: recipe.start_from is None and recipe.x > 0.2
    report = swept(tmp_path / "s", max_failures=9, seed=2)
    trials = report.details["trials"]
    able = {one["trial"] for one in trials[:4] if one["status"] == "finished"}
    assert 0 < len(able) < 3
    assert {one["parent"] for one in trials[4:8]} == able
    assert all(one["status"] == "finished" for one in trials[4:])
    walks.fails = lambda recipe: True
    with pytest.raises(RunFailed, match="no member of generation 1 ended with loss"):
        swept(tmp_path / "t", max_failures=9)


SPACE = Space(
    (
        Parameter("rate", "log_uniform", low=1e-4, high=1e-1),
        Parameter("share", "uniform", low=-1.0, high=1.0),
        Parameter("count", "integer", low=1, high=9),
        Parameter("of", "choice", values=("a", "b", "c", "d")),
        Parameter("more", "choice", values=(1, 2), when={"of": ("a",)}),
    )
)


def test_settings_move_by_a_fifth_or_to_a_neighbour_and_stay_within_their_ends() -> None:
    begun = {"rate": 1e-2, "share": 0.5, "count": 2, "of": "b"}
    seen = [explored(SPACE, begun, random.Random(seed), 0.0) for seed in range(40)]
    for key, near in (("rate", {8e-3, 1.2e-2}), ("share", {0.4, 0.6}), ("count", {1, 3}), ("of", {"a", "c"})):
        assert {one[key] for one in seen} == near
    assert all(("more" in one) == (one["of"] == "a") for one in seen)
    ends = {"rate": 1e-1, "share": -1.0, "count": 9, "of": "d"}
    for one in (explored(SPACE, ends, random.Random(seed), 0.0) for seed in range(40)):
        assert one["rate"] <= 1e-1
        assert one["share"] >= -1
        assert one["count"] <= 9
        assert one["of"] == "c"
    anew = {explored(SPACE, begun, random.Random(seed), 1.0)["count"] for seed in range(99)}
    assert anew == set(range(1, 10))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"space": {"x": [0.1, 0.2], "shape": [1, 2]}}, "space.shape: .* may be x; give shape in base, or"),
        ({"space": {"x": [0.1, 0.2]}}, "trials=4: the space has only 2 different settings for members"),
        ({"search": "optuna"}, "search=optuna learns from trials that have ended"),
        ({"trials": 1}, "trials=1: scheduler=pbt compares members; give 2 or more"),
        ({"pbt": {"interval": 12}}, "pbt.interval=12: a run of 12 steps has no second segment"),
        ({"base": {"kind": "cosine"}}, "base.kind=cosine: scheduler=pbt knows no end; give base.kind=const"),
        ({"base": {"start_from": "x"}}, "base.start_from=x: scheduler=pbt sets it; give base.start_from=no"),
        ({"verb": "toy", "base": {"n": 1}}, "scheduler=pbt begins trials where others ended, which toy cann"),
        ({"verb": "compress", "base": {"recipe": "gptq"}}, "scheduler=pbt .*compress has none; take schedul"),
    ],
)
def test_what_cannot_be_a_population_is_said_before_the_first_trial(
    walks: Walks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str
) -> None:
    known(monkeypatch)
    with pytest.raises(AxiconError, match=f"^{says}"):
        swept(tmp_path / "s", **settings)
    assert not walks.runs
    assert not (tmp_path / "s" / "ledger.jsonl").exists()


def test_another_number_of_members_is_another_population(walks: Walks, tmp_path: Path) -> None:
    swept(tmp_path / "s")
    with pytest.raises(AxiconError, match="another recipe: trials was 4 and is 5"):
        swept(tmp_path / "s", trials=5)


def finetuning(place: Path, out: Path, rule: dict[str, Any]) -> SweepRecipe:
    """Two members, three segments of two steps."""
    tiny_model(place / "model", positions=128)
    records = [{"text": f"number {i}", "label": i % 2} for i in range(8)]
    (place / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return SweepRecipe.parse(
        verb="finetune",
        base={
            "model": str(place / "model"),
            "data": {
                "train": str(place / "data.jsonl"), "evaluate": str(place / "data.jsonl"),
                "template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"},
            },
            "rule": rule, "scheme": {"method": "lora", "r": 2}, "steps": 6, "batch": 4,
        },
        space={"rule.lr": {"log_uniform": [1e-3, 1e-1]}},
        trials=2, scheduler="pbt", pbt={"interval": 2}, full={"threads": 1}, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["zo_sgd", "adamw"])
def test_a_population_of_finetunings(tmp_path: Path, rule: str) -> None:
    """A segment that another command takes from its parent's end is the same, bit for bit."""
    asked = finetuning(tmp_path, tmp_path / "s", {"method": rule})
    found = sweep.run(asked, Reporter(io.StringIO()), one_by_one).details
    assert [one["status"] for one in found["trials"]] == ["finished"] * 6
    assert [one["steps"][0]["step"] for one in found["trials"]] == [2, 2, 4, 4, 6, 6]
    assert len({one["parent"] for one in found["trials"][2:4]}) == 1, "one of two copies the other"
    folder = tmp_path / "s" / "trials" / found["best"]
    best = FinetuneRecipe.parse(**read_file(tmp_path / "s" / "best.yaml"))
    again = finetune.run(best)
    assert again.details["digest"] == json.loads((folder / "run.json").read_text())["digest"]
    with pytest.raises(AxiconError, match=r"space.scheme.r: scheduler=pbt .* may be rule.\*, batch; give"):
        Plan.of(asked.model_copy(update={"space": SweepRecipe.parse(space={"scheme.r": [1, 2]}).space}))
