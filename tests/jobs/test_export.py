"""`axicon export`: the directory, what is said about it, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from axicon.compress.directory import write_compressed
from axicon.compress.group_int4 import GroupInt4
from axicon.compress.llm_int8 import LLMInt8
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.protocols import Compressor
from jobs import __main__ as command
from jobs import export as job
from tests.faults import failing
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")


def export(*words: str) -> str:
    line = ["export", "compressed-tensors", *words]
    result = CliRunner().invoke(command.axicon, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def packed(tmp_path: Path, method: Compressor) -> Path:
    dense, source = tmp_path / "dense", tmp_path / "packed"
    saved("llama_tied", dense)
    (dense / "LICENSE").write_text("free")
    (dense / "notes.bin").write_text("mine")
    source.mkdir()
    write_compressed(method, dense, source, dtype=torch.float32)
    return source


@torch.no_grad()
def test_a_whole_directory_is_written(tmp_path: Path) -> None:
    source, target = packed(tmp_path, GroupInt4(group=16)), tmp_path / "new" / "out"
    assert export(str(source), f"out={target}") == f"it lies in {target}\n"
    assert {path.name for path in target.iterdir()} >= {"config.json", "model.safetensors", "LICENSE"}
    assert not (target / "notes.bin").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    tokens = torch.arange(20)[None]
    ours, theirs = (checkpoint.load(one, dtype=torch.float32).logits(tokens) for one in (source, target))
    assert torch.equal(ours, theirs)


def test_what_changes_is_said(tmp_path: Path) -> None:
    said = export(str(packed(tmp_path, LLMInt8())), f"out={tmp_path / 'out'}").splitlines()
    assert said == [
        "note: the head is the embedding itself; its packed copy is left out",
        "note: activations of int8 products are not rounded by programs that read this",
        f"it lies in {tmp_path / 'out'}",
    ]


@pytest.mark.parametrize(("words", "says"), [
    (["packed"], "out is missing"),
    (["packed", "out=there"], r"out=.*there exists already; choose another directory or remove it"),
    (["dense", "out=out"], "is not compressed; make it smaller first: axicon compress group_int4"),
    (["packed", "out=out", "zeros=some"], "zeros"),
    (["packed", "out=out", "ones=packed"], "ones"),
    (["exported", "out=out"], "is in another tool's format already"),
    (["nowhere/at/all", "out=out"], "nowhere/at/all: no such file or directory"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    packed(tmp_path, GroupInt4())
    (tmp_path / "there").mkdir()
    if words[0] == "exported":
        export(str(tmp_path / "packed"), f"out={tmp_path / 'exported'}")
    model = words[0] if "/" in words[0] else str(tmp_path / words[0])
    place = [word.replace("out=", f"out={tmp_path}/") for word in words[1:]]
    with pytest.raises(AxiconError, match=says) as caught:
        export(model, *place)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_whatever_operation_of_the_disk_fails(tmp_path: Path) -> None:
    """The directory is whole or not there, and the failure is one line. The cache may fail without one."""
    source, target, said = packed(tmp_path, GroupInt4()), tmp_path / "out", []
    for number in range(1, 16):
        with failing(number):
            try:
                job.run("compressed-tensors", str(source), job.ExportRecipe(out=target))
            except AxiconError as error:
                said.append(str(error))
        if target.exists():
            checkpoint.check(target)
            shutil.rmtree(target)
        assert {path.name for path in tmp_path.iterdir()} <= {"dense", "packed"}
    assert len(said) > 5
    assert not any("\n" in line for line in said)
