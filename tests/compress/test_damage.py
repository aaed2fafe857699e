"""Models that cannot be walked over: one line that says where, and finished blocks are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from axicon.compress.calibration import Calibration
from axicon.compress.directory import compress_blocks
from axicon.compress.gptq import GPTQ
from axicon.compress.work import Work
from axicon.errors import AxiconError
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def walk(tmp_path: Path) -> Work:
    """The work folder after as many blocks as could be finished."""
    work = Work(tmp_path / "work", {})
    compress_blocks(
        GPTQ(group=16), tmp_path / "dense", work, Calibration(TOKENS), dtype=torch.float32, on_disk=True)
    return work


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number(value: float, tmp_path: Path) -> None:
    saved("opt", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.layers.2.fc1.weight"
    sound = tensors[name].clone()
    tensors[name][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(AxiconError, match=r"layers\.2\.fc1\.weight holds NaN or infinite values") as caught:
        walk(tmp_path)
    assert "\n" not in str(caught.value)
    assert Work(tmp_path / "work", {}).done == 2
    save_file(tensors | {name: sound}, path)
    assert walk(tmp_path).done == 3


def test_inputs_that_are_no_numbers(tmp_path: Path) -> None:
    """Finite weights whose products overflow."""
    saved("opt", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.decoder.layers.1.final_layer_norm.bias"].fill_(3e38)
    save_file(tensors, path)
    with pytest.raises(AxiconError, match=r"blocks\.1.* NaN or infinite values") as caught:
        walk(tmp_path)
    assert "\n" not in str(caught.value)
    assert Work(tmp_path / "work", {}).done == 1


def test_an_unknown_architecture(tmp_path: Path) -> None:
    saved("opt", tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    with pytest.raises(AxiconError, match=r"mamba.* axicon has no weight map for it; it reads ") as caught:
        walk(tmp_path)
    assert "\n" not in str(caught.value)
