"""What is submitted means what was typed: paths deep in a recipe, and where a job looks for them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from jobs import __main__ as command
from jobs import plan, submit, submitted

BASE = "model: demo\ntext: text.txt\ncompressor: gptq\n"
STEPS = """
steps:
- {name: small, verb: compress, settings: {compressor: gptq, calibration: {text: text.txt}}}
- name: tried
  verb: sweep
  settings: {base: {recipe: base.yaml, model: '{small}'}, space: {compressor.bits: [4]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "other.txt", "train.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "steps.yaml").write_text(STEPS)
    return tmp_path


def made(verb: str, *words: str, here: bool = True) -> plan.Plan:
    return plan.make(command.axicon, verb, words, here=here, sent=Path("/nowhere"))


@pytest.mark.parametrize(
    ("verb", "words", "inputs"),
    [
        ("sweep", ("base=base.yaml", "space.compressor.bits=[3,4]"), ["text.txt"]),
        ("sweep", ("base=gptq", "space.text=[text.txt,other.txt]"), ["other.txt", "text.txt"]),
        ("sweep", ("base=gptq", "space.seed=[1,2]", "full.text=text.txt"), ["text.txt"]),
        ("run", ("steps.yaml",), ["text.txt", "text.txt"]),
        ("finetune", ("demo", "data.train=train.jsonl", "data.evaluate=hub/name"), ["train.jsonl"]),
        ("distill", ("data.source=train.jsonl",), ["train.jsonl"]),
    ],
)
def test_what_a_recipe_names_deep_inside_is_an_input(
    folder: Path, verb: str, words: tuple[str, ...], inputs: list[str]
) -> None:
    found = made(verb, *words)
    assert sorted(str(path) for path in found.inputs) == [str(folder / name) for name in inputs]
    first = found.name("")
    assert made(verb, *words).name("") == first
    os.utime(folder / inputs[0], (1, 1))
    assert made(verb, *words).name("") != first
    told = " ".join(made(verb, *words, here=False).warnings)
    assert f"{inputs[0]} is a path of this machine" in told


def test_a_base_that_says_something_else_is_another_job(folder: Path) -> None:
    words = ("sweep", "base=base.yaml", "space.compressor.bits=[3,4]", "out=made")
    first = made(*words).name("")
    (folder / "base.yaml").write_text(BASE + "seed: 3\n")
    assert made(*words).name("") != first


@pytest.mark.parametrize(
    ("verb", "words", "says"),
    [
        ("sweep", ("base=gone.yaml", "space.seed=[1]"), "gone.yaml: cannot be read"),
        ("sweep", ("base=gptq", "base.text=gone.txt", "space.seed=[1]"), "no such file: gone.txt"),
        ("sweep", ("base=gptq", "space.text=[gone.txt]"), "no such file: gone.txt"),
        ("finetune", ("demo", "data.train=gone.jsonl"), "no such file: gone.jsonl"),
        ("distill", ("data.source=./gone",), "no such file: gone"),
        ("compress", ("gptq", "--again"), "--again is an option of submit: give it before compress"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_sent(
    folder: Path, verb: str, words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(AxiconError, match=says):
        made(verb, *words)


def test_a_job_looks_where_it_was_submitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = submit.environment(made("sweep", "base=base.yaml", "space.seed=[1]"))
    assert env["AXICON_SUBMITTED_FROM"] == str(folder)
    assert "AXICON_SUBMITTED_FROM" not in submit.environment(made("compress", "gptq", here=False))
    monkeypatch.setenv("AXICON_SUBMITTED_FROM", str(folder))
    monkeypatch.chdir("/")
    submitted.stand_where_submitted()
    assert Path.cwd() == Path("/"), "a variable alone makes no job"
    monkeypatch.setenv(submitted.JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "x"}}))
    submitted.stand_where_submitted()
    assert Path.cwd() == folder
    monkeypatch.setenv("AXICON_SUBMITTED_FROM", str(folder / "gone"))
    with pytest.raises(AxiconError, match=r"gone: this was submitted from there .*; submit it from another"):
        submitted.stand_where_submitted()


def test_results_in_a_folder_of_here_are_another_job_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ("evaluate", "demo", f"text={folder}/text.txt")
    here, there = made(*named).name(""), made(*named, f"out={folder}/made").name("")
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    assert made(*named).name("") != here
    assert made(*named, f"out={folder}/made").name("") == there


def test_a_verb_without_a_recipe_makes_its_result_here(folder: Path) -> None:
    (folder / "model").mkdir()
    found = made("export", "gguf", "model", "out=made")
    assert found.words == ("gguf", f"{folder}/model", f"out={folder}/made")
