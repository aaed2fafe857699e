"""A stopped evaluation goes on where it was, and its figures are those of one that was not stopped."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.evaluate import harness
from axicon.evaluate.answered import Answered
from axicon.recipe import EvaluateRecipe
from jobs import evaluate
from jobs.progress import Reporter
from jobs.stop import NOTHING_KEPT, Stopped, stop_on_signal


@pytest.fixture
def recipe(model_dir: Path, tmp_path: Path, prose: str) -> EvaluateRecipe:
    (tmp_path / "text.txt").write_text(prose * 4)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    records = [{"sentence": f"film number {n} .", "label": n % 2} for n in range(40)]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text(lines)
    return EvaluateRecipe(
        model=str(model_dir),
        threads=1,
        text=str(tmp_path / "text.txt"),
        window=32,
        tasks=("sst2",),
        data=tmp_path / "data",
        out=tmp_path / "out",
    )


class Passes:
    """Counts what the model is asked, and sends SIGTERM in the middle of pass number `stop_in`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.stop_in: int | None = None
        # The package has a function of the module's name.
        text = sys.modules["axicon.evaluate.perplexity"]
        for place, name in ((text, "window_losses"), (harness.AxiconLM, "_score")):
            monkeypatch.setattr(place, name, self.counting(getattr(place, name)))

    def counting(self, ask: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def asked(*args: Any) -> Iterator[Any]:
            answers = list(ask(*args))
            if self.count == self.stop_in:
                signal.raise_signal(signal.SIGTERM)
            self.count += 1
            yield from answers

        return asked


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    monkeypatch.setitem(harness.AxiconLM.__init__.__kwdefaults__, "batch_tokens", 64)  # several passes
    return Passes(monkeypatch)


def run(recipe: EvaluateRecipe) -> tuple[dict[str, float], str]:
    said = io.StringIO()
    with stop_on_signal():
        return dict(evaluate.run(recipe, Reporter(said)).metrics), said.getvalue()


def test_figures_of_a_stopped_and_continued_run_are_those_of_one_run(
    recipe: EvaluateRecipe, passes: Passes, tmp_path: Path
) -> None:
    whole, _ = run(recipe.model_copy(update={"out": tmp_path / "whole"}))
    all_passes, folder = passes.count, tmp_path / "out" / "tiny"
    assert all_passes > 12
    # Stopped in the text, then in the task, then never.
    for number, stop_in in enumerate((3, all_passes - 2)):
        passes.count, passes.stop_in = (0 if number == 0 else 3), stop_in
        with pytest.raises(Stopped) as caught:
            run(recipe)
        assert "rerun the same command to continue" in caught.value.kept
        assert [path.name for path in folder.iterdir()] == [evaluate.unfinished(recipe)]
    passes.count, passes.stop_in = 0, None
    continued, said = run(recipe)
    assert continued == whole, "exactly, not nearly"
    assert passes.count == 2, "only what had not been answered"
    assert "going on from" in said
    assert not (folder / evaluate.unfinished(recipe)).exists()


def test_one_that_was_stopped_before_it_measured_keeps_nothing(
    recipe: EvaluateRecipe, passes: Passes, tmp_path: Path
) -> None:
    passes.stop_in = 0
    with pytest.raises(Stopped) as caught:
        run(recipe)
    assert caught.value.kept == NOTHING_KEPT
    assert list((tmp_path / "out" / "tiny").iterdir()) == []


def test_answers_of_other_threads_are_not_taken_up(recipe: EvaluateRecipe, passes: Passes) -> None:
    passes.stop_in = 3
    with pytest.raises(Stopped):
        run(recipe)
    passes.count, passes.stop_in = 0, None
    _, said = run(recipe.model_copy(update={"threads": 2}))
    assert passes.count > 12
    assert "going on" not in said


def test_answers_keep_every_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-310, 2 / 3, -17.000000000000004]
    kept = Answered(tmp_path / "kept.json", {"threads": 1})
    kept.put("a", values)
    kept.write()
    assert Answered(tmp_path / "kept.json", {"threads": 1}).get("a") == values
    assert Answered(tmp_path / "kept.json", {"threads": 2}).get("a") is None
    assert kept.key("losses", [1, 2]) != kept.key("losses", [1, 3])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 2, "identity": {}, "answers": {}}', "is of format 2, this axicon reads 1"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(AxiconError, match=says) as caught:
        Answered(tmp_path / "kept.json")
    assert "remove it to begin anew" in str(caught.value)
