"""`axicon distill` on small images and texts: the same bytes after a kill, and what is refused."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from axicon.distill.dataset import Dataset
from axicon.errors import AxiconError, RunFailed
from axicon.model.artefact import read_manifest
from axicon.model.intact import problems
from jobs import distill
from jobs.__main__ import axicon
from jobs.distill_experts import _reason
from jobs.distill_recipe import DistillRecipe
from jobs.lineage import run as lineage
from jobs.progress import Reporter
from jobs.report import Report
from tests.conftest import ROOT
from tests.services.tiny import tiny_model

pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra `distill`")
pytest.importorskip("PIL", reason="needs Pillow, of the extra `distill`")

AXICON = Path(sysconfig.get_path("scripts")) / "axicon"


def write_images(path: Path, count: int = 48, size: int = 4, labels: int = 3) -> Path:
    """Grey images as lists: those of a class are bright in a row of its own."""
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, size, size), generator=made)
    y = torch.arange(count) % labels
    for i, label in enumerate(y.tolist()):
        images[i, label] += 150
    table = pyarrow.table({"image": images.tolist(), "label": y.tolist()})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_images(folder / "images.parquet")
    return folder


def recipe(place: Path, **changes: Any) -> DistillRecipe:
    values: dict[str, Any] = {
        "data": {"source": str(place / "images.parquet")},
        "network": {"method": "mlp", "width": 4},
        "experts": {"count": 2, "epochs": 4, "batch": 8, "lr": 0.05},
        "judge": {"nets": 2, "epochs": 20, "every": 4, "baselines": False},
        "iterations": 8, "steps": 3, "expert_epochs": 2, "max_start": 3, "alpha": 0.1, "lr_data": 1.0,
        "checkpoint_every": 2,
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return DistillRecipe.parse(**values)


def digest(report: Report) -> str:
    return str(report.details["digest"])


def test_a_run_from_its_data_to_a_data_set(place: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, dict[str, float]]] = []

    class Listening(Reporter):
        def figures(self, step: int, metrics: Any) -> None:
            heard.append((step, dict(metrics)))

    asked = recipe(place, out=tmp_path / "run", judge={"baselines": True})
    report = distill.run(asked, Listening(io.StringIO()))
    assert [step for step, _ in heard] == [4, 8]
    assert heard[-1][1]["accuracy"] == report.metrics["accuracy"]
    assert {
        "accuracy_random",
        "accuracy_kmeans",
        "accuracy_experts",
        "expert_movement",
    } <= report.metrics.keys()
    result = report.files[0]
    made = Dataset.read(result)
    assert made.examples.x.shape == (3, 1, 4, 4)
    assert made.examples.y.tolist() == [0, 1, 2]
    assert made.alpha == pytest.approx(report.metrics["alpha"])
    assert problems(result) == []
    assert (result / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    card = (result / "README.md").read_text()
    assert f"{report.metrics['accuracy']:.1%}" in card
    found = lineage(str(result))
    assert found.sha256 == digest(report)
    [chain] = found.chain or ()
    assert "experts.lr=0.05" in chain
    assert "ipc" not in chain, "a default"
    [parent] = found.parents
    assert (parent.name, parent.state) == ("images.parquet", "here")
    for expert in (tmp_path / "run" / "experts").glob("*/0*"):
        assert problems(expert) == []


def test_a_byte_that_changed_is_found(place: Path, tmp_path: Path) -> None:
    result = distill.run(recipe(place, out=tmp_path / "run", iterations=1)).files[0]
    file = result / "synthetic.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    [problem] = problems(result)
    assert problem.file == "synthetic.safetensors"
    again = distill.run(recipe(place, out=tmp_path / "run", iterations=1))
    assert problems(again.files[0]) == []


def test_stopping_anywhere_changes_no_byte(place: Path, tmp_path: Path) -> None:
    want = distill.run(recipe(place, out=tmp_path / "want", experts={"momentum": 0.5}, batch=2))
    parts = {"out": tmp_path / "parts", "experts": {"momentum": 0.5}, "batch": 2}
    distill.run(recipe(place, iterations=3, **parts))
    log = tmp_path / "parts" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step":3,"loss":3.1')  # killed while it wrote
    checkpoint = tmp_path / "parts" / "checkpoint.safetensors"
    earlier = checkpoint.read_bytes()
    distill.run(recipe(place, iterations=5, **parts))
    checkpoint.write_bytes(earlier)  # killed before it kept one again, with more in the log
    (tmp_path / "parts" / "judged.json").unlink()  # killed before it judged
    assert digest(distill.run(recipe(place, **parts))) == digest(want)
    assert log.read_bytes() == (tmp_path / "want" / "log.jsonl").read_bytes()
    assert distill.run(recipe(place, network={"depth": 1}, **parts)).details["digest"] == digest(want), (
        "a default that is said"
    )
    with pytest.raises(AxiconError, match=r"iterations=3: .* has gone 8 already"):
        distill.run(recipe(place, iterations=3, **parts))


def test_a_checkpoint_without_its_log_is_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    distill.run(recipe(place, out=tmp_path / "run", iterations=2))
    (tmp_path / "run" / "log.jsonl").unlink()
    with pytest.raises(AxiconError, match="they do not belong together; remove checkpoint"):
        distill.run(recipe(place, out=tmp_path / "run", lr_data=3.0))


def test_real_examples_are_judged_anew_where_the_step_size_moved_on(place: Path, tmp_path: Path) -> None:
    found = []
    for iterations in (2, 4):
        asked = recipe(place, out=tmp_path / "run", iterations=iterations, judge={"baselines": True})
        distill.run(asked)
        found.append(json.loads((tmp_path / "run" / "judged.json").read_text())["compared"]["alpha"])
    assert found[0] != found[1]


def test_killed_and_run_again(place: Path, tmp_path: Path) -> None:
    want = distill.run(recipe(place, out=tmp_path / "want", iterations=40))
    asked = recipe(place, out=tmp_path / "killed", iterations=40)
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.as_yaml())
    log = tmp_path / "killed" / "log.jsonl"
    process = subprocess.Popen([AXICON, "distill", str(file)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.exists()
    assert digest(distill.run(asked)) == digest(want)


def test_processes_train_the_experts_of_this_one(place: Path, tmp_path: Path) -> None:
    want = distill.run(recipe(place, out=tmp_path / "want"))
    found = distill.run(recipe(place, out=tmp_path / "workers", workers=2))
    assert digest(found) == digest(want)
    ours, theirs = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name / "experts").rglob("*.*s")}
        for name in ("want", "workers")
    )
    assert [*ours.values()] == [*theirs.values()]


def test_what_ended_a_process_is_said_in_its_words() -> None:
    log = "Traceback\nexperts: expert 0 is not finite after epoch 2: take a smaller experts.lr (now 9)\n"
    assert _reason(log, 1).startswith("expert 0 is not finite")
    assert _reason("", -9) == "a process that trains experts ended (exit code -9)"


def test_experts_are_shared_between_runs_that_differ_in_something_else(place: Path, tmp_path: Path) -> None:
    shared = {"folder": str(tmp_path / "experts")}
    distill.run(recipe(place, out=tmp_path / "one", experts=shared, iterations=1))
    said = io.StringIO()
    distill.run(
        recipe(place, out=tmp_path / "two", experts=shared, iterations=1, lr_data=2.0), Reporter(said)
    )
    assert "2 of 2 experts lie in" in said.getvalue()
    [kind] = (tmp_path / "experts").glob("*")
    other = {**shared, "lr": 0.04}
    distill.run(recipe(place, out=tmp_path / "three", experts=other, iterations=1))
    assert len([*(tmp_path / "experts").glob("*")]) == 2
    path = kind / "0001" / "trajectory.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AxiconError, match=r"0001: trajectory.safetensors has .* remove that folder"):
        distill.run(recipe(place, out=tmp_path / "four", experts=shared, iterations=1))


CONVNET = {"method": "convnet", "width": 2, "depth": 1}


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests with all switches off."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        str(kind["method"]): digest(
            distill.run(recipe(place, out=folder / str(kind["method"]), iterations=2, steps=4, network=kind))
        )
        for kind in ({"method": "mlp"}, CONVNET)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"switches": {"clip_loss": True}},
        {"switches": {"grad_penalty": 2.0}},
        {"switches": {"representative": True}},
        {"switches": {"balance": True}},
        {"switches": {"mid_match": "agg"}},
        {"switches": {"mid_match": "adaptive"}},
        {"momentum": 0.9},
        {"switches": {"perturb": 1.0}, "network": CONVNET},
        {"init": "noise"},
        {"init": "kmeans"},
        {"augment": "shift,cutout"},
    ],
    ids=str,
)
def test_each_switch_is_one(
    place: Path, tmp_path: Path, plain: dict[str, str], changes: dict[str, Any]
) -> None:
    """It changes the result, by itself, and the result is finite."""
    found = distill.run(recipe(place, out=tmp_path / "run", iterations=2, steps=4, **changes))
    assert digest(found) != plain["convnet" if "network" in changes else "mlp"]
    assert torch.isfinite(load_file(found.files[0] / "synthetic.safetensors")["x"]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ipc": 14}, "class 0 has 13 examples to train on, ipc=14 asks for more; take ipc=13 or less"),
        ({"max_start": 4}, r"max_start=4 and expert_epochs=2 reach epoch 5, .*take experts.epochs=5"),
        ({"network": "conv"}, "network=conv: known are convnet, linear, mlp"),
        ({"network": {"method": "convnet", "depth": 3}}, "halving 4 x 4 so often leaves nothing"),
        ({"augment": "twirl"}, "augment=twirl: known for images are shift"),
        ({"data": {"source": "digits", "limit": 3}}, "data.source=digits are images with a test set"),
        ({"data": {"label": "class"}}, "record 1: no label in field 'class'; its fields are image, label"),
        ({"data": {"column": "picture"}}, "no image in field 'picture'"),
        ({"data": {"source": "nowhere.parquet"}}, "no such file: nowhere.parquet"),
        ({"modality": "text"}, "record 1: no text in field 'text'"),
        (
            {"init": "noise", "switches": {"representative": True}},
            "switches.representative and init=noise: both say what to begin with",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AxiconError, match=said):
        distill.run(recipe(place, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_data": 2.0}, "lr_data is 1.0 there and 2.0 here; give that, or another out="),
        ({"switches": {"balance": True}}, "switches.balance is False there and True here"),
        ({"data": {"held_out": 0.4}}, r"data is [0-9a-f]{12}\.\.\. there and"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    distill.run(recipe(place, out=tmp_path / "run", iterations=2))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(AxiconError, match=said):
        distill.run(recipe(place, out=tmp_path / "run", **changes))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_losses_that_are_not_finite_stop_the_run_and_checkpoints_stay(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"iteration \d: the matching loss is not finite.*smaller lr_data"):
        distill.run(recipe(place, out=tmp_path / "run", lr_data=1e35, checkpoint_every=1))
    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert torch.isfinite(kept["x"]).all()


def test_students_that_stand_still_stop_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="step size of students has fallen to its floor"):
        distill.run(
            recipe(place, out=tmp_path / "run", alpha=20.0, lr_alpha=1e6, lr_data=1e-6, checkpoint_every=1)
        )


def test_a_full_disk_loses_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = distill.run(recipe(place, out=tmp_path / "want"))
    calls = 0

    def full(path: Path, content: str | bytes) -> None:
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.distill.write_atomically", full)
        with pytest.raises(AxiconError, match="No space left on device; experts and checkpoints are kept"):
            distill.run(recipe(place, out=tmp_path / "run"))
    assert calls == 1
    assert digest(distill.run(recipe(place, out=tmp_path / "run"))) == digest(want)


def test_texts_become_vectors_that_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model", positions=64)
    words = ("good", "bad")
    records = [{"text": f"{words[i % 2]} number {i}", "label": words[i % 2]} for i in range(24)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in records))
    changes: dict[str, Any] = {
        "data": {"source": str(source)}, "modality": "text", "text": {"model": str(model)},
        "network": "linear",
    }  # fmt: skip
    report = distill.run(recipe(tmp_path, out=tmp_path / "run", **changes))
    made = Dataset.read(report.files[0])
    assert made.examples.x.shape == (2, 64)
    assert made.examples.classes == ("bad", "good")
    assert not (report.files[0] / "contact_sheet.png").exists()
    assert "| bad | bad number" in (report.files[0] / "README.md").read_text()
    manifest = read_manifest(report.files[0]) or {}
    assert [parent["name"] for parent in manifest["parents"]] == ["texts.jsonl", "model"]
    assert [parent.state for parent in lineage(str(report.files[0])).parents] == ["here", "here"]
    monkeypatch.setattr("jobs.distill_data.features", lambda *_: pytest.fail("computed again"))
    assert digest(distill.run(recipe(tmp_path, out=tmp_path / "run", **changes))) == digest(report)


def test_the_command_says_what_came_of_it(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(place, out=tmp_path / "run", iterations=2).as_yaml())
    done = CliRunner().invoke(axicon, ["distill", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"digest {found['digest'][:12]}" in done.output
    shown = CliRunner().invoke(axicon, ["distill", "digits", "--show"])
    assert "source: digits" in shown.output


def test_without_scikit_learn_one_line_names_the_extra(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(AxiconError, match=r"data.source=digits comes with scikit-learn: .*axicon\[distill\]"):
        distill.run(DistillRecipe.parse(out=tmp_path / "run"))
