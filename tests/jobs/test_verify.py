"""`axicon verify`: damage is named with the way out, and only damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from axicon.compress.directory import write_compressed
from axicon.compress.llm_int8 import LLMInt8
from axicon.errors import AxiconError
from axicon.model.artefact import write_manifest
from jobs import __main__ as command
from jobs import verify
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    saved("llama_tied", tmp_path / "dense")
    folder = tmp_path / "packed"
    folder.mkdir()
    write_compressed(LLMInt8(), tmp_path / "dense", folder, dtype=torch.bfloat16)
    write_manifest(folder, name="packed")
    return folder


def test_an_intact_directory(model: Path) -> None:
    verdict = verify.run(str(model))
    assert verdict.problems == []
    assert f"{model} is intact: llama of 3 blocks, int8, 3 files of " in verdict.summary
    (model / "report.json").write_text("{}")
    (model / "README.md").write_text("mine")
    assert verify.run(str(model)).problems == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (lambda m: (m / "config.json").unlink(), "config.json", "is missing"),
        (lambda m: flip(m / "packed.safetensors"), "packed.safetensors", "bytes were changed"),
        (lambda m: (m / "config.json").write_text("{}"), "config.json", "has 2 bytes, the manifest says"),
        (lambda m: (m / "model.safetensors").write_text(""), "model.safetensors", "not in the manifest"),
        (lambda m: (m / "report.json").write_text("["), "report.json", "not valid JSON"),
        (lambda m: (m / "manifest.json").write_text('{"format_version": 1}'), "manifest.json", "no files"),
        (lambda m: (m / "manifest.json").write_text('{"format_version": 1, "files": {"../x": {}}}'),
         "manifest.json", "lists '../x', which is not in this directory"),
    ],
)  # fmt: skip
def test_damage_is_named_with_the_way_out(
    damage: Callable[[Path], object], file: str, what: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    [problem, *_] = verify.run(str(model)).problems
    assert problem.file == file
    assert what in problem.what
    assert len(problem.do) > 10
    with pytest.raises(SystemExit) as caught:
        command.main(["verify", str(model)])
    assert caught.value.code == 1
    assert file in capsys.readouterr().out


def test_tensors_that_do_not_fit_are_found_under_a_manifest_that_fits(model: Path) -> None:
    weights = load_file(model / "packed.safetensors")
    del weights["blocks.1.out.absmax"]
    save_file(weights, model / "packed.safetensors")
    write_manifest(model, name="packed")
    [problem] = verify.run(str(model)).problems
    assert "blocks.1.out.absmax missing" in problem.what


def test_without_a_manifest_it_says_how_far_it_looked(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    verdict = verify.run(str(tmp_path / "dense"))
    assert verdict.problems == []
    assert "llama of 3 blocks, dense; its headers, names and shapes are in order" in verdict.summary
    assert "nothing says what its bytes should be" in verdict.summary
    path = tmp_path / "dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    [problem] = verify.run(str(tmp_path / "dense")).problems
    assert problem.file == "model.safetensors"
    assert "not a valid safetensors file" in problem.what


def test_what_is_no_model_or_of_a_newer_axicon_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AxiconError, match="give a model directory"):
        verify.run(str(tmp_path / "empty"))
    with pytest.raises(AxiconError, match="no such file or directory"):
        verify.run(str(tmp_path / "none"))
    path = model / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(AxiconError, match="format version 2, this axicon reads 1; update axicon"):
        verify.run(str(model))
