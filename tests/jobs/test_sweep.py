"""A sweep of a verb that takes no time: what is tried, kept, said and gone on with."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError, RunFailed
from axicon.model.artefact import write_all
from jobs import sweep, sweep_ledger
from jobs.sweep_document import Ranking
from jobs.sweep_ledger import Trial, read
from jobs.sweep_plan import Plan
from jobs.sweep_show import settings
from tests.jobs.toy import Toy, known, one_by_one, recipe, swept


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    return known(monkeypatch)


def finished(number: str, **metrics: float) -> Trial:
    return Trial(number, {}, "", status="finished", metrics=metrics)


class TestRanking:
    TRIALS = (
        finished("0001", size=1, loss=5), finished("0002", size=2, loss=3), finished("0003", size=3, loss=3),
        finished("0004", size=4, loss=1), finished("0005", size=5), Trial("0006", {}, "", "failed"),
    )  # fmt: skip

    def test_the_front_is_what_nothing_beats_and_the_first_objective_says_which_is_the_best(self) -> None:
        found = Ranking({"loss": "min", "size": "min"})
        assert found.front(self.TRIALS) == {"0001", "0002", "0004"}
        assert found.best(self.TRIALS) is self.TRIALS[3]
        assert Ranking({"size": "max"}).best(self.TRIALS) is self.TRIALS[4]

    def test_beyond_a_limit_nothing_is_best_and_nothing_on_the_front(self) -> None:
        found = Ranking({"size": "min", "loss": "min"}, {"loss": {"max": 3}})
        assert found.front(self.TRIALS) == {"0002", "0004"}
        assert found.best(self.TRIALS) is self.TRIALS[1]
        assert not found.within(self.TRIALS[4]), "a figure that is not known"
        assert Ranking({"size": "min"}, {"size": {"min": 9}}).best(self.TRIALS) is None


def test_a_sweep_finds_the_best_and_leaves_all_of_it_on_disk(toy: Toy, tmp_path: Path) -> None:
    said = io.StringIO()
    report = swept(tmp_path / "s", said, objectives={"loss": "min", "bytes": "min"}, full={"steps": 2})
    document = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert document["status"] == "finished"
    assert len(document["trials"]) == len(toy.runs) == 6
    losses = {one["trial"]: one["metrics"]["loss"] for one in document["trials"]}
    assert losses[document["best"]] == min(losses.values()) == report.metrics["loss"]
    assert [one["recipe_sha256"] for one in document["trials"]] == [
        one.recipe_sha256 for one in read(tmp_path / "s" / "ledger.jsonl")[1].values()
    ]
    assert len({one["recipe_sha256"] for one in document["trials"]}) == 6
    assert document["best"] in (tmp_path / "s" / "sweep.html").read_text()
    assert "steps: 2" in (tmp_path / "s" / "best.yaml").read_text()
    lines = [line for line in said.getvalue().splitlines() if " finished " in line]
    assert len(lines) == 6
    assert f"{document['best']} finished" in "".join(line for line in lines if "the best so far" in line)
    assert any(f"the best is {document['best']}" in line for line in sweep.summary(report))


def test_the_winner_can_be_run_in_full(toy: Toy, tmp_path: Path) -> None:
    swept(tmp_path / "s", run_best=True, full={"steps": 4})
    *trials, full = toy.runs
    assert len(trials) == 6
    assert (full["steps"], full["out"]) == (4, str(tmp_path / "s" / "best"))
    assert full["x"] == min((one["x"] for one in trials), key=lambda x: (x - 2) ** 2)


class Killed(BaseException):
    """As a kill: nothing tidies up behind it."""


def torn(at: int, part: float, error: BaseException) -> Callable[[int, bytes], None]:
    """Writes as always, but of call `at` only a part, and then raises."""
    calls = itertools.count()

    def write(descriptor: int, text: bytes) -> None:
        if next(calls) == at:
            os.write(descriptor, text[: int(len(text) * part)])
            raise error
        write_all(descriptor, text)

    return write


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_no_trial_is_lost_or_run_twice_wherever_a_sweep_is_killed(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """At ten random writes of the ledger, after a random part of the line, in turn for each search."""
    asked: dict[str, dict[str, Any]] = {
        search: {"search": search, "trials": 5, "space": {"n": [1, 2], "x": [1, 2, 4]}}
        for search in ("grid", "random", "optuna")
    }
    wholes = {search: swept(tmp_path / search, **settings) for search, settings in asked.items()}
    draw = random.Random(7)
    for attempt in range(10):
        out, at, part = tmp_path / str(attempt), draw.randrange(2 * 5 + 1), draw.random()
        whole, settings = list(zip(wholes.values(), asked.values(), strict=True))[attempt % 3]
        toy.runs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sweep_ledger, "write_all", torn(at, part, error))
            with pytest.raises(Killed if isinstance(error, Killed) else RunFailed):
                swept(out, **settings)
        again = swept(out, **settings)
        assert again.details["best"] == whole.details["best"]
        theirs, ours = ([one["settings"] for one in r.details["trials"]] for r in (whole, again))
        assert ours == theirs
        ends = Counter(
            event["trial"]
            for event in map(json.loads, (out / "ledger.jsonl").read_text().splitlines())
            if event.get("status") == "finished"
        )
        assert set(ends.values()) == {1}
        assert len(toy.runs) <= 5 + 1, "only the trial whose end was not written runs again"


def test_the_same_command_runs_nothing_twice_and_more_trials_go_on(toy: Toy, tmp_path: Path) -> None:
    first = swept(tmp_path / "s")
    said = io.StringIO()
    swept(tmp_path / "s", said)
    assert len(toy.runs) == 6
    assert "nothing is left to run" in said.getvalue()
    more = swept(tmp_path / "s", trials=8)
    assert len(toy.runs) == 8
    assert more.details["trials"][:6] == [
        one | {"front": more.details["trials"][at]["front"]} for at, one in enumerate(first.details["trials"])
    ]


def test_an_edited_recipe_is_told_what_changed(toy: Toy, tmp_path: Path) -> None:
    swept(tmp_path / "s")
    with pytest.raises(AxiconError, match=r"another recipe: base.n was 3 and is 2; give that, or a new name"):
        swept(tmp_path / "s", base={"n": 2})
    with pytest.raises(AxiconError, match=r"space.x.uniform was \[0.0, 4.0\] and is \[0.0, 5.0\]; seed was"):
        swept(tmp_path / "s", space={"x": {"uniform": [0, 5]}, "n": [1, 2, 3]}, seed=2)
    assert len(toy.runs) == 6
    other = swept(tmp_path / "s", objectives={"bytes": "min"}, limits={"loss": {"max": 1}}, max_failures=9)
    assert len(toy.runs) == 6, "another order of the same trials"
    assert other.details["objectives"] == [{"metric": "bytes", "direction": "min"}]


def test_failed_trials_say_why_and_end_the_sweep_when_they_are_too_many(toy: Toy, tmp_path: Path) -> None:
    def fails(recipe: Any) -> None:
        if recipe.n != 2:
            raise AxiconError(f"n={recipe.n} does not fit") if recipe.n == 1 else ZeroDivisionError("by zero")

    toy.does = fails
    grid = {"space": {"n": [1, 2, 3], "x": [1, 2]}, "search": "grid", "trials": None}
    found = swept(tmp_path / "s", max_failures=4, **grid).details
    reasons = [one["reason"] for one in found["trials"]]
    assert reasons == ["n=1 does not fit"] * 2 + [None] * 2 + ["ZeroDivisionError: by zero"] * 2
    assert (found["status"], found["best"]) == ("finished", "0004")
    assert "Traceback" in (tmp_path / "s" / "trials" / "0005.log").read_text()
    toy.runs.clear()
    with pytest.raises(
        RunFailed, match=r"2 trials failed, more than max_failures=1; the last one, 0002: n=1"
    ):
        swept(tmp_path / "t", max_failures=1, **grid)
    assert json.loads((tmp_path / "t" / "sweep.json").read_text())["status"] == "failed"
    swept(tmp_path / "t", max_failures=4, **grid)
    assert len(toy.runs) == 6


def test_a_full_disk_in_a_trial_ends_the_sweep_and_the_trial_is_tried_again(toy: Toy, tmp_path: Path) -> None:
    def full(recipe: Any) -> None:
        if len(toy.runs) == 3:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise AxiconError("cannot write it: No space left on device") from error

    toy.does = full
    with pytest.raises(
        RunFailed, match=r"trial 0003: cannot write it.*; 2 trials are kept in .*, free some space"
    ):
        swept(tmp_path / "s")
    found = swept(tmp_path / "s").details
    assert [one["status"] for one in found["trials"]] == ["finished"] * 6
    assert len(toy.runs) == 7


def test_an_objective_that_no_trial_reports_is_said_after_two(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"objectives.los: no trial reports it: did you mean 'loss'\?"):
        swept(tmp_path / "s", objectives={"los": "min"})
    assert len(toy.runs) == 2
    swept(tmp_path / "s", objectives={"loss": "min"})
    assert len(toy.runs) == 6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"verb": "toi"}, "verb=toi: did you mean 'toy'"),
        ({"verb": "serve"}, "verb=serve: sweeps try compress, distill, evaluate, finetune, toy"),
        ({"base": {}}, "base: names nothing to vary; give a recipe of toy"),
        ({"base": {"recipe": "missing.yaml"}}, "missing.yaml: cannot be read"),
        ({"base": {"m": 1}}, "base: unknown key 'm': "),
        ({"base": {"n": 1, "threads": 4}}, "base.threads=4: give threads= of the sweep instead"),
        ({"space": {"n": [-1, -2]}}, "space: none of 32 settings makes a recipe: n=-.: must be greater than"),
        ({"full": {"stepps": 3}}, "full: unknown key 'stepps': did you mean 'steps'"),
        ({"search": "grid"}, "space.x: a grid takes lists of values, not uniform"),
        (
            {"space": {"n": {"integer": [1, 5000]}}, "search": "grid", "trials": None},
            "the grid has more than 1000",
        ),
    ],
)
def test_what_can_be_known_is_said_before_the_first_trial(
    toy: Toy, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(AxiconError, match=f"^{says}"):
        swept(tmp_path / "s", **settings)
    assert not toy.runs
    assert not (tmp_path / "s" / "ledger.jsonl").exists()


def test_a_space_that_is_used_up_ends_the_sweep(toy: Toy, tmp_path: Path) -> None:
    said = io.StringIO()
    found = swept(tmp_path / "s", said, space={"n": [1, 2], "x": [1, 2]}, trials=9).details
    assert len(found["trials"]) == 4
    assert found["status"] == "finished"
    assert "no more than 4 different trials" in said.getvalue()
    unsaid = recipe(tmp_path / "t", space={"n": [1, 2], "x": [1, 2]}, trials=None)
    assert Plan.of(unsaid).wanted == 4


def test_optuna_learns_from_the_trials_before(toy: Toy, tmp_path: Path) -> None:
    """Of 24 trials, those behind the first ten are nearer to the best place than any two thirds of draws."""
    found = swept(tmp_path / "s", search="optuna", trials=24, space={"x": {"uniform": [-20, 20]}}).details
    far = [abs(one["settings"]["x"] - 2) for one in found["trials"]]
    assert sum(far[10:]) / 14 < sum(far[:10]) / 10 * 0.6


def test_optuna_is_an_extra(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AxiconError, match=r"search=optuna wants Optuna: install axicon\[sweep\]"):
        swept(tmp_path / "s", search="optuna")


def test_two_sweeps_do_not_write_into_one_folder(toy: Toy, tmp_path: Path) -> None:
    def second(recipe_of_trial: Any) -> None:
        with pytest.raises(AxiconError, match=r"another axicon .* is making it"):
            sweep.run(recipe(tmp_path / "s"), runner=one_by_one)

    toy.does = second
    assert swept(tmp_path / "s", trials=1).details["trials"][0]["status"] == "finished"


def test_tensorboard_reads_curves_and_settings_of_every_trial(toy: Toy, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    swept(tmp_path / "s", base={"steps": 3}, trials=2)
    assert sorted(path.name for path in (tmp_path / "s" / "tensorboard").iterdir()) == ["0001", "0002"]
    [path] = (tmp_path / "s" / "tensorboard" / "0001").iterdir()
    values: dict[str, list[tuple[int, float]]] = {}
    content, at = path.read_bytes(), 0
    while at < len(content):  # length, its checksum, event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
    one = json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"][0]
    curve = [(step["step"], step["metrics"]["loss"]) for step in one["steps"]]
    assert [step for step, _ in curve] == [1, 2, 3]
    told = values["loss"]
    assert [step for step, _ in told] == [1, 2, 3, 3]
    losses = [loss for _, loss in curve] + [one["metrics"]["loss"]]
    assert [loss for _, loss in told] == pytest.approx(losses, rel=1e-6)
    assert "_hparams_/session_start_info" in values


def test_a_line_names_methods_in_few_words() -> None:
    assert settings(
        {"x": 1.5, "rule": {"method": "adamw", "lr": 0.001}, "chain": "round, cut", "n": None}
    ) == ("x=1.5 rule=adamw(lr=0.001) chain=round,cut n=none")
    assert settings({"chain": [{"method": "round"}, {"method": "cut", "at": 1}]}) == "chain=round,cut(at=1)"
