"""`axicon evaluate` from a recipe to files."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from axicon.errors import AxiconError
from axicon.evaluate import serving
from axicon.model.artefact import write_manifest
from axicon.recipe import EvaluateRecipe
from jobs import evaluate, report
from jobs.model_report import ModelReport
from jobs.progress import Reporter
from tests.evaluate.tiny import save_model

SST2 = [
    {"sentence": "a gorgeous film .", "label": 1},
    {"sentence": "dull .", "label": 0},
    {"sentence": "so so .", "label": 0},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(record) for record in SST2))
    return folder.parent


@pytest.fixture
def text(tmp_path: Path, prose: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose * 4)
    return path


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


def run(model: Path, said: io.StringIO, **settings: Any) -> report.Report:
    recipe = EvaluateRecipe(model=str(model), threads=1, **settings)
    return evaluate.run(recipe, Reporter(said))


def test_both_kinds_of_measurement_end_in_one_file(
    model_dir: Path, data: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    done = run(
        model_dir,
        said,
        text=str(text),
        window=32,
        windows=3,
        tasks=("sst2",),
        data=data,
        limit=2,
        out=tmp_path / "out",
    )
    results, samples = done.files
    content = json.loads(results.read_text())
    assert results.parent == tmp_path / "out" / "tiny"
    assert results.name.startswith("results_20")
    assert content["axicon"]["perplexity"]["value"] == done.metrics["perplexity"]
    assert content["axicon"]["perplexity"]["windows"] == 3
    assert content["axicon"]["recipe"]["window"] == 32
    assert len(content["axicon"]["model_sha256"]) == 64
    assert content["results"]["sst2"]["acc,none"] == done.metrics["sst2/acc"]
    assert content["n-samples"]["sst2"] == {"original": 3, "effective": 2}
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc"]["sentence"] for line in lines] == ["a gorgeous film .", "dull ."]
    assert lines[0]["arguments"]["gen_args_1"]["arg_1"] == " positive"
    assert isinstance(lines[0]["resps"][0][0][0], str)
    assert set(os.listdir(results.parent)) == {results.name, samples.name}


def test_the_file_has_the_keys_lm_eval_writes(
    model_dir: Path, data: Path, tmp_path: Path, said: io.StringIO
) -> None:
    """Compared with the file of lm-eval's own command for its dummy model."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from axicon.evaluate.run import TASKS_DIR

    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    manager = TaskManager(
        include_path=str(TASKS_DIR), include_defaults=False, metadata={"data_dir": str(data)}
    )
    theirs = lm_eval.simple_evaluate(
        model="dummy",
        model_args="pretrained=x",
        tasks=["sst2"],
        task_manager=manager,
        evaluation_tracker=tracker,
    )
    samples = theirs.pop("samples")
    tracker.save_results_aggregated(theirs, samples)
    tracker.save_results_samples("sst2", samples["sst2"])
    (their_results,) = (tmp_path / "theirs").rglob("results_*.json")
    (their_samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")

    results, our_samples = run(model_dir, said, tasks=("sst2",), data=data, out=tmp_path / "out").files
    ours, theirs = json.loads(results.read_text()), json.loads(their_results.read_text())
    assert theirs.keys() - ours.keys() == set()
    assert ours.keys() - theirs.keys() <= {"axicon"} | {
        key for key in ours if key.startswith("tokenizer_")
    } | {
        "eot_token_id",
        "max_length",
    }
    assert ours["task_hashes"] == theirs["task_hashes"]
    assert ours["results"]["sst2"].keys() == theirs["results"]["sst2"].keys()
    first, their_first = (
        json.loads(path.read_text().splitlines()[0]) for path in (our_samples, their_samples)
    )
    assert first.keys() == their_first.keys()
    assert first["arguments"] == their_first["arguments"]
    for key in ("doc_hash", "prompt_hash", "target_hash", "target", "doc_id", "filter", "metrics"):
        assert first[key] == their_first[key]


def test_perplexity_alone_needs_no_tasks(
    model_dir: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    done = run(model_dir, said, text=str(text), window=16, windows=2, out=tmp_path)
    content = json.loads(done.files[0].read_text())
    assert content["results"] == {}
    assert content["config"]["model_args"] == f"pretrained={model_dir},dtype=bfloat16"
    assert list(done.metrics) == ["perplexity"]
    assert said.getvalue().startswith("perplexity 2/2, ")


def test_what_a_person_sees(
    model_dir: Path, data: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    from rich.console import Console

    done = run(
        model_dir, said, text=str(text), window=16, windows=2, tasks=("sst2",), data=data, out=tmp_path
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluate.table(done))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{done.metrics['perplexity']:.4f}" in shown
    assert "2 windows of 16" in shown
    assert "acc" in shown
    assert f"{done.metrics['sst2/acc']:.4f}" in shown


@pytest.mark.usefixtures("few_lm_eval_tasks")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "nothing to measure: give text=FILE"),
        ({"text": "none.txt"}, "no such file: none.txt"),
        ({"tasks": ("sst3",), "data": "."}, "no task named sst3"),
        ({"tasks": ("sst2",), "data": "none"}, "data=none: no such folder"),
        (
            {"text": "text.txt", "out": Path("text.txt")},
            r"out=text.txt/tiny: cannot be written \(Not a directory\)",
        ),
    ],
)
def test_mistakes_show_before_the_model_is_read(
    model_dir: Path,
    tmp_path: Path,
    text: Path,
    settings: dict[str, Any],
    says: str,
    said: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("axicon.model.checkpoint.load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(AxiconError, match=says):
        run(model_dir, said, **settings)
    assert not list(tmp_path.rglob("results_*"))


def test_numbers_json_does_not_know_become_null(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "x.json"
    report.write_json(
        path, {"a": math.nan, "b": np.float64(0.5), "c": (np.int64(3), torch.float32), "d": {1: None}}
    )
    assert json.loads(path.read_text()) == {"a": None, "b": 0.5, "c": [3, "torch.float32"], "d": {"1": None}}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(AxiconError, match=r"x.json: cannot be written \(No space left on device\)"):
        report.write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_whole_and_few_off_a_terminal(said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: next(clock))
    with Reporter(said).track("work") as advance:
        for done in (1, 2, 3, 4):
            advance(done, 4, "so far")
    assert said.getvalue() == "work 2/4, so far, 11 s\nwork 4/4, so far, 13 s\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Reporter(screen).track("work") as advance:
        advance(3, 3, "done")
    assert "3/3" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


@pytest.fixture
def own_dir(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with a manifest, long enough for the measurement of speed in these tests."""
    from axicon.evaluate import speed

    monkeypatch.setattr(serving, "measure", serving.measure_here)
    monkeypatch.setattr(speed.rates, "__kwdefaults__", speed.rates.__kwdefaults__ | {"new_tokens": 4})
    folder = save_model(tmp_path / "own", tokenizer, positions=128)
    write_manifest(folder, kind="model", name="own", chain=[], parents=[])
    return folder


def test_a_model_of_ours_gets_its_figures_into_its_report(
    own_dir: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    done = run(own_dir, said, text=str(text), window=16, windows=2, speed=True, out=tmp_path / "out")
    written = ModelReport.read(own_dir)
    assert f"{own_dir / 'report.json'} now holds perplexity and tokens per second\n" in said.getvalue()
    assert written.perplexity.dense == done.metrics["perplexity"]
    assert written.perplexity.compressed is None
    assert written.perplexity.protocol == "gptq, window 16, bfloat16"
    assert written.perplexity.windows == 2
    assert written.perplexity.text_sha256 == done.details["axicon"]["perplexity"]["text_sha256"]
    assert written.tokens_per_s.get("1") == done.metrics["tokens_per_s/1"]
    assert written.tokens_per_s.get("8") == done.metrics["tokens_per_s/8"]
    assert written.bytes.total == (own_dir / "model.safetensors").stat().st_size
    content = json.loads((own_dir / "report.json").read_text())
    assert content["perplexity"]["reason"] == {"compressed": "the model is a dense one"}
    assert "reason" not in content["tokens_per_s"]
    assert (
        json.loads(done.files[0].read_text())["axicon"]["tokens_per_s"]["1"] == content["tokens_per_s"]["1"]
    )


def test_a_compressed_one_fills_the_other_place_and_keeps_what_was_measured_alike(
    own_dir: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    settings: dict[str, Any] = {"text": str(text), "window": 16, "windows": 2, "out": tmp_path / "out"}
    dense = run(own_dir, said, **settings).metrics["perplexity"]
    (own_dir / "manifest.json").unlink()
    write_manifest(own_dir, kind="model", name="own", chain=[{"method": "magnitude"}], parents=[])
    run(own_dir, said, **settings)
    both = ModelReport.read(own_dir).perplexity
    assert (both.dense, both.compressed) == (dense, dense)

    other = run(own_dir, said, **settings | {"windows": 3}).metrics["perplexity"]
    replaced = ModelReport.read(own_dir).perplexity
    assert (replaced.dense, replaced.compressed, replaced.windows) == (None, other, 3)
    assert replaced.why("dense") == "not measured"
    assert said.getvalue().endswith("; the figures measured otherwise were replaced\n")


def test_a_model_changed_after_loading_leaves_the_report_alone(
    own_dir: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    int8 = EvaluateRecipe.parse(["compressor=llm_int8"]).compressor
    run(own_dir, said, text=str(text), window=16, windows=1, compressor=int8, out=tmp_path / "out")
    assert not (own_dir / "report.json").exists()
    assert "the figures are of the model after compressor=llm_int8" in said.getvalue()


def test_a_directory_that_cannot_be_written_is_a_line(
    own_dir: Path, text: Path, tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("jobs.model_report.write_atomically", refuse)
    done = run(own_dir, said, text=str(text), window=16, windows=1, out=tmp_path / "out")
    assert done.metrics["perplexity"] > 0
    assert f"{own_dir / 'report.json'} was not updated: Read-only file system\n" in said.getvalue()


def test_a_model_of_others_is_left_alone(
    model_dir: Path, text: Path, tmp_path: Path, said: io.StringIO
) -> None:
    run(model_dir, said, text=str(text), window=16, windows=1, out=tmp_path)
    assert not (model_dir / "report.json").exists()
    assert "report.json" not in said.getvalue()


def test_a_model_too_short_for_speed_says_so(
    model_dir: Path, tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axicon.evaluate.serving.measure", serving.measure_here)
    done = run(model_dir, said, speed=True, out=tmp_path)
    speed = done.details["axicon"]["tokens_per_s"]
    assert (speed["1"], speed["8"]) == (None, None)
    assert "this model has room for 64 together" in speed["reason"]["8"]
    assert done.metrics == {}
    assert any("room for 64" in cell for cell in evaluate.table(done).columns[4].cells)


def test_a_report_that_cannot_be_read_shows_before_the_work(
    own_dir: Path, text: Path, tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_dir / "report.json").write_text('{"bytes": {"total": -1}}')
    monkeypatch.setattr("axicon.model.checkpoint.load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(AxiconError, match=r"report\.json: bytes\.total: .* remove the file"):
        run(own_dir, said, text=str(text), window=16, windows=1, out=tmp_path / "out")
