"""`start_from`: a finetuning run that goes on from another one's end, to the bits of one that never ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.finetune.log import read
from axicon.model.artefact import read_manifest
from jobs import finetune, finetune_start, replay
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe
from jobs.report import Report
from tests.services.tiny import tiny_model

ZO, ADAMW = {"method": "zo_sgd", "lr": 1e-2}, {"method": "adamw", "lr": 1e-2}
RULES: list[dict[str, Any]] = [
    {"method": "zo_momentum", "lr": 1e-2},
    {"method": "zo_adam", "lr": 1e-2},
    {"method": "zo_sgd", "lr": 1e-2, "share": 0.5, "resample": 2, "queries": 2},
    {"method": "zo2", "lr": 1e-2},
    ADAMW,
    {"method": "sgd", "lr": 1e-2, "momentum": 0.9},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model(folder / "model", positions=128)
    records = [{"text": f"number {i}", "label": i % 2} for i in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def recipe(place: Path, out: Path, **changes: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "data": {
            "train": str(place / "data.jsonl"), "evaluate": str(place / "data.jsonl"),
            "template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"}, "evaluate_limit": 4,
        },
        "rule": ZO, "scheme": {"method": "lora", "r": 2}, "steps": 5, "batch": 4, "evaluate_every": 5,
        "threads": 1, "keep": "last", "out": out,
    }  # fmt: skip
    return FinetuneRecipe.parse(**values | changes)


def digest(report: Report) -> str:
    return str(report.details["digest"])


def steps_of(folder: Path) -> list[Any]:
    return read(folder / "log.jsonl")[1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["method"])
def test_with_equal_settings_it_is_the_run_that_never_stopped(
    place: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    """In three parts, and again from the folder alone once the parents are gone."""
    whole = finetune.run(recipe(place, tmp_path / "whole", rule=rule, schedule={"warmup": 4}))
    before: dict[str, Any] = {}
    for name, steps in (("a", 2), ("b", 3), ("c", 5)):
        asked = recipe(place, tmp_path / name, rule=rule, schedule={"warmup": 4}, steps=steps, **before)
        parts = finetune.run(asked)
        before = {"start_from": tmp_path / name}
    assert digest(parts) == digest(whole)
    assert steps_of(tmp_path / "c") == steps_of(tmp_path / "whole")
    found = parts.details["evaluations"]
    assert [one for one in found if one["step"] not in (2, 3)] == whole.details["evaluations"]
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    assert digest(finetune.run(asked)) == digest(whole)
    if rule["method"].startswith("zo"):
        for step in (1, 4):
            theirs = replay.run(tmp_path / "whole", ReplayRecipe(step=step)).digest
            assert replay.run(tmp_path / "c", ReplayRecipe(step=step)).digest == theirs


@pytest.mark.parametrize("rule", [ZO, {"method": "zo_adam", "lr": 1e-2}, ADAMW])
def test_other_settings_hold_behind_the_step_it_begins_from(
    place: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    two = finetune.run(recipe(place, tmp_path / "a", rule=rule, steps=2))
    whole = finetune.run(recipe(place, tmp_path / "whole", rule=rule))
    asked = recipe(place, tmp_path / "b", rule=rule | {"lr": 5e-2}, batch=2, start_from=tmp_path / "a")
    found = finetune.run(asked)
    assert steps_of(tmp_path / "b")[:2] == steps_of(tmp_path / "a")
    assert steps_of(tmp_path / "b")[2] != steps_of(tmp_path / "whole")[2], "another batch"
    assert digest(found) != digest(whole)
    header = read(tmp_path / "b" / "log.jsonl")[0]
    [earlier] = header["earlier"]
    assert (earlier["until"], earlier["rule"]["lr"], header["rule"]["lr"]) == (2, 1e-2, 5e-2)
    settings = (read_manifest(tmp_path / "b" / "result") or {})["chain"][-1]["settings"]
    assert settings["start_from"] == earlier["log"]
    assert digest(finetune.run(asked)) == digest(found)
    assert replay.run(tmp_path / "b", ReplayRecipe()).digest == digest(found)
    if rule is not ADAMW:
        assert replay.run(tmp_path / "b", ReplayRecipe(step=2)).digest == digest(two)


def test_a_kill_while_it_begins_or_later_changes_no_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing tidies up behind it."""

    def killed(*_: object) -> None:
        raise Killed

    finetune.run(recipe(place, tmp_path / "a", rule=ADAMW, steps=2))
    asked = {"rule": ADAMW | {"lr": 2e-2}, "start_from": tmp_path / "a"}
    want = finetune.run(recipe(place, tmp_path / "want", **asked))
    for place_of_kill in ("write_atomically", "first_line", "copy_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(finetune_start, place_of_kill, killed)
            with pytest.raises(Killed):
                finetune.run(recipe(place, tmp_path / "b", **asked))
        assert not (tmp_path / "b" / "log.jsonl").exists()
    finetune.run(recipe(place, tmp_path / "b", steps=4, **asked))
    finetune.run(recipe(place, tmp_path / "a", rule=ADAMW, steps=3))  # the parent goes on by itself
    assert digest(finetune.run(recipe(place, tmp_path / "b", **asked))) == digest(want)
    assert (tmp_path / "b" / "log.jsonl").read_bytes() == (tmp_path / "want" / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": {"method": "lora", "r": 3}}, "scheme.r is 2 there and 3 here; a run goes on with the sa"),
        ({"rule": ADAMW}, "rule.name is ZoSGD there and AdamW here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"steps": 1}, "2 steps were taken there; give steps=2 or more"),
        ({"start_from": "b"}, "is the run's own folder"),
        ({"start_from": "nothing"}, r"no run of axicon finetune lies there \(log.jsonl is missing\)"),
    ],
)
def test_what_cannot_go_on_is_said_and_leaves_no_log(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    finetune.run(recipe(place, tmp_path / "a", steps=2))
    changes = {"start_from": "a"} | changes
    changes["start_from"] = tmp_path / changes["start_from"]
    with pytest.raises(AxiconError, match=f"^start_from=.*{said}"):
        finetune.run(recipe(place, tmp_path / "b", **changes))
    assert not (tmp_path / "b" / "log.jsonl").exists()


def test_a_folder_belongs_to_one_parent(place: Path, tmp_path: Path) -> None:
    for name, lr in (("a", 1e-2), ("other", 2e-2)):
        finetune.run(recipe(place, tmp_path / name, rule=ZO | {"lr": lr}, steps=2))
    finetune.run(recipe(place, tmp_path / "b", steps=3, start_from=tmp_path / "a"))
    with pytest.raises(AxiconError, match="began from another run than lies in"):
        finetune.run(recipe(place, tmp_path / "b", start_from=tmp_path / "other"))
    with pytest.raises(AxiconError, match="another run: give its start_from, or another out="):
        finetune.run(recipe(place, tmp_path / "b"))
    with pytest.raises(AxiconError, match="another run: leave out start_from, or another out="):
        finetune.run(recipe(place, tmp_path / "a", start_from=tmp_path / "other"))
