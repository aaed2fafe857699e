"""`start_from`: a distillation that goes on from another one's end, to the bits of one that never ended."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.finetune.log import read
from axicon.model.artefact import read_manifest
from jobs import distill, distill_experts, distill_start, sweep
from jobs.command import read_file
from jobs.distill_recipe import DistillRecipe
from jobs.distill_start import VARY
from jobs.progress import Reporter
from jobs.sweep_recipe import SweepRecipe
from tests.jobs.test_distill import digest, recipe, write_images
from tests.jobs.toy import one_by_one

pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra `distill`")
pytest.importorskip("PIL", reason="needs Pillow, of the extra `distill`")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_images(folder / "images.parquet")
    return folder


def steps_of(folder: Path) -> list[Any]:
    return read(folder / "log.jsonl")[1]


def test_with_equal_settings_it_is_the_run_that_never_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three parts, without training an expert twice, and again once the parents are gone."""
    whole = distill.run(recipe(place, out=tmp_path / "whole"))
    first = distill.run(recipe(place, out=tmp_path / "a", iterations=3))

    def again(*_: object) -> None:
        raise AssertionError("experts are there")

    monkeypatch.setattr(distill_experts, "train_expert", again)
    for name, iterations, parent in (("b", 5, "a"), ("c", 8, "b")):
        changes = {"iterations": iterations, "start_from": tmp_path / parent}
        asked = recipe(place, out=tmp_path / name, **changes)
        parts = distill.run(asked)
    assert digest(parts) == digest(whole) != digest(first)
    assert steps_of(tmp_path / "c") == steps_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert digest(distill.run(asked)) == digest(whole)


def test_other_settings_hold_behind_where_it_begins(place: Path, tmp_path: Path) -> None:
    distill.run(recipe(place, out=tmp_path / "a", iterations=4))
    whole = distill.run(recipe(place, out=tmp_path / "whole"))
    changes = {"lr_data": 3.0, "lr_alpha": 1e-3, "steps": 4, "momentum": 0.5, "batch": 2, "max_start": 2}
    assert {*changes, "expert_epochs"} == set(VARY)
    asked = recipe(place, out=tmp_path / "b", start_from=tmp_path / "a", **changes)
    found = distill.run(asked)
    assert steps_of(tmp_path / "b")[:4] == steps_of(tmp_path / "a")
    assert digest(found) != digest(whole)
    header = read(tmp_path / "b" / "log.jsonl")[0]
    [earlier] = header["earlier"]
    assert (earlier["until"], earlier["lr_data"], header["lr_data"]) == (4, 1.0, 3.0)
    settings = (read_manifest(tmp_path / "b" / "result") or {})["chain"][-1]["settings"]
    assert settings["start_from"] == earlier["log"]
    assert digest(distill.run(asked)) == digest(found)


def test_a_kill_while_it_begins_or_later_changes_no_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing tidies up behind it."""

    def killed(*_: object) -> None:
        raise Killed

    distill.run(recipe(place, out=tmp_path / "a", iterations=3))
    asked = {"lr_data": 2.0, "start_from": tmp_path / "a"}
    want = distill.run(recipe(place, out=tmp_path / "want", **asked))
    for place_of_kill in ("write_atomically", "first_line", "copy_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(distill_start, place_of_kill, killed)
            with pytest.raises(Killed):
                distill.run(recipe(place, out=tmp_path / "b", **asked))
        assert not (tmp_path / "b" / "log.jsonl").exists()
    distill.run(recipe(place, out=tmp_path / "b", iterations=6, **asked))
    distill.run(recipe(place, out=tmp_path / "a", iterations=5))  # the parent goes on by itself
    assert digest(distill.run(recipe(place, out=tmp_path / "b", **asked))) == digest(want)
    assert (tmp_path / "b" / "log.jsonl").read_bytes() == (tmp_path / "want" / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ipc": 2}, "ipc is 1 there and 2 here; a run goes on with the same data"),
        ({"experts": {"lr": 0.1}}, "experts.lr is 0.05 there and 0.1 here"),
        ({"iterations": 1}, "3 steps were taken there; give iterations=3 or more"),
        ({"start_from": "b"}, "is the run's own folder"),
        ({"start_from": "nothing"}, r"no run of axicon distill lies there \(log.jsonl is missing\)"),
    ],
)
def test_what_cannot_go_on_is_said_and_leaves_no_log(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    distill.run(recipe(place, out=tmp_path / "a", iterations=3))
    changes = {"start_from": "a"} | changes
    changes["start_from"] = tmp_path / changes["start_from"]
    with pytest.raises(AxiconError, match=f"^start_from=.*{said}"):
        distill.run(recipe(place, out=tmp_path / "b", **changes))
    assert not (tmp_path / "b" / "log.jsonl").exists()


def test_what_it_began_from_is_asked_for_again_and_not_lost(place: Path, tmp_path: Path) -> None:
    distill.run(recipe(place, out=tmp_path / "a", iterations=3))
    distill.run(recipe(place, out=tmp_path / "b", start_from=tmp_path / "a"))
    with pytest.raises(AxiconError, match="log of another run: give its start_from, or another out="):
        distill.run(recipe(place, out=tmp_path / "b"))
    with pytest.raises(AxiconError, match="log of another run: leave out start_from"):
        distill.run(recipe(place, out=tmp_path / "a", start_from=tmp_path / "b"))
    shutil.rmtree(tmp_path / "a")
    distill.run(recipe(place, out=tmp_path / "a", iterations=3, lr_data=2.0))
    with pytest.raises(AxiconError, match=r"began from another run than lies in start_from=.*/a now; "):
        distill.run(recipe(place, out=tmp_path / "b", start_from=tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b" / "checkpoint.safetensors").unlink()
    with pytest.raises(AxiconError, match="which start_from brought, is gone; remove"):
        distill.run(recipe(place, out=tmp_path / "b", start_from=tmp_path / "a"))
    assert len(steps_of(tmp_path / "b")) == 8


def test_a_population_of_distillations(place: Path, tmp_path: Path) -> None:
    """Three segments of two members, whose winner another command makes again, bit for bit."""
    base = recipe(place, experts={"folder": str(tmp_path / "experts")}).model_dump(
        mode="json", exclude_defaults=True
    )
    asked = SweepRecipe.parse(
        verb="distill", base=base, space={"lr_data": {"log_uniform": [0.1, 10.0]}},
        objectives={"accuracy": "max"}, trials=2, scheduler="pbt", pbt={"interval": 3}, full={"threads": 1},
        out=tmp_path / "s",
    )  # fmt: skip
    found = sweep.run(asked, Reporter(io.StringIO()), one_by_one).details
    assert [one["status"] for one in found["trials"]] == ["finished"] * 6
    assert [one["steps"][-1]["step"] for one in found["trials"]] == [3, 3, 6, 6, 8, 8]
    parents = [one["parent"] for one in found["trials"]]
    assert parents[:2] == [None, None]
    assert len(set(parents[2:4])) == 1, "one of two copies the other"
    folder = tmp_path / "s" / "trials" / found["best"]
    again = distill.run(DistillRecipe.parse(**read_file(tmp_path / "s" / "best.yaml")))
    assert digest(again) == json.loads((folder / "run.json").read_text())["digest"]
