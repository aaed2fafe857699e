"""`axicon run`: steps that build on each other, going on, and what is refused before."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axicon.errors import AxiconError
from axicon.model.artefact import read_manifest
from jobs import compress
from jobs import run as job
from jobs.progress import Reporter
from jobs.report import Report
from jobs.run_recipe import RunRecipe
from tests.services.fake_engine import byte_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

STEPS: list[dict[str, Any]] = [
    {
        "name": "int8",
        "verb": "compress",
        "recipe": "llm_int8",
        "settings": {"model": "{model}", "measure": False},
    },
    {
        "name": "pruned",
        "verb": "compress",
        "settings": {
            "model": "{model}",
            "compressor": {"method": "magnitude", "sparsity": 0.5},
            "measure": False,
        },
    },
    {
        "name": "small",
        "verb": "compress",
        "settings": {
            "model": "{pruned}",
            "compressor": {"method": "gptq", "group": 32},
            "calibration": {"windows": 4, "window": 32},
            "measure": False,
        },
    },
    {"name": "found", "verb": "evaluate", "settings": {"model": "{small}", "text": "{text}", "window": 32}},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(dense: Path, out: Path, steps: list[dict[str, Any]] = STEPS, **more: Any) -> tuple[Report, str]:
    said = io.StringIO()
    recipe = RunRecipe.parse(model=str(dense), steps=steps, out=str(out), threads=1, **more)
    return job.run(recipe, Reporter(said)), said.getvalue()


def test_each_step_builds_on_those_before_it(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 8)
    report, said = run(dense, tmp_path / "run", text=str(tmp_path / "text.txt"))
    assert [line for line in said.splitlines() if line.startswith("step")] == [
        "step 1/4, int8: compress",
        "step 2/4, pruned: compress",
        "step 3/4, small: compress",
        "step 4/4, found: evaluate",
    ]
    small, pruned = (read_manifest(tmp_path / "run" / name) for name in ("small", "pruned"))
    assert small is not None
    assert pruned is not None
    assert [link["method"] for link in small["chain"]] == ["magnitude", "gptq"]
    assert small["parents"][0]["source"] == str(tmp_path / "run" / "pruned")
    assert report.metrics["found/perplexity"] > 1

    again, said = run(dense, tmp_path / "run", text=str(tmp_path / "text.txt"))
    assert said.count("done before") == 4
    assert again.metrics == report.metrics


def test_goes_on_behind_the_step_that_failed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real, calls = STEPS[:3], compress.run, []

    def failing(recipe: Any, reporter: Any = None) -> Report:
        calls.append(recipe.out.name)
        if calls.count("pruned") == 1 and recipe.out.name == "pruned":
            raise AxiconError("no room")
        return real(recipe, reporter)

    monkeypatch.setattr(compress, "run", failing)
    with pytest.raises(AxiconError, match=r"^step pruned: no room$"):
        run(dense, tmp_path / "run", steps)
    run(dense, tmp_path / "run", steps)
    assert calls == ["int8", "pruned", "pruned", "small"]
    done = json.loads((tmp_path / "run" / "run.json").read_text())["steps"]
    assert list(done) == ["int8", "pruned", "small"]


def test_an_edited_step_is_another_run(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "run", STEPS[:1])
    edited = [STEPS[0] | {"settings": {"model": "{model}", "measure": False, "dtype": "float32"}}]
    with pytest.raises(AxiconError, match=r"int8 was done with another dtype .*new folder"):
        run(dense, tmp_path / "run", edited)


def step(**settings: Any) -> dict[str, Any]:
    return {"name": "two", "verb": "compress", "settings": settings}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "steps: there is none"),
        ([STEPS[0], step(model="{inte8}")], "no step before it is named inte8; known are model, .*int8"),
        ([step(model="{model}"), STEPS[0], STEPS[0]], "int8 is a name already"),
        ([step(out="elsewhere")], "steps.two: out is given by the run"),
        ([step(modle="{model}")], "steps.two: unknown key 'modle': did you mean 'model'"),
        ([{"name": "two", "verb": "prune"}], "verb=prune: a step is one of compress, "),
        ([STEPS[0] | {"recipe": "nowhere.yaml"}], "nowhere.yaml: cannot be read"),
        ([STEPS[0] | {"name": "text"}], "steps: text is a name already"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(
    dense: Path, tmp_path: Path, steps: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(AxiconError, match=said):
        run(dense, tmp_path / "run", steps)
    assert not (tmp_path / "run").exists()


def test_braces_of_templates_are_left_alone() -> None:
    assert job._put_in({"a": ["{{ text }} {x}", 3]}, {"x": "y"}, "s") == {"a": ["{{ text }} y", 3]}
