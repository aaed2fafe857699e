"""Settings by block under a budget: against all combinations, and from models to a recipe that makes one."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from axicon.compress.allocate import allocate
from axicon.errors import AxiconError
from axicon.model.artefact import read_manifest
from axicon.recipe import CompressRecipe
from jobs import compress
from jobs.allocate import Uniform
from jobs.command import axicon
from jobs.progress import Reporter
from jobs.verbs import artefacts  # noqa: F401 - adds the verb
from tests.parity.variants import saved
from tests.services.fake_engine import byte_tokenizer


def brute_force(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> float:
    found = [
        sum(errors[b][c] for b, c in enumerate(chosen))
        for chosen in itertools.product(range(len(sizes[0])), repeat=len(sizes))
        if sum(sizes[b][c] for b, c in enumerate(chosen)) <= budget
    ]
    return min(found)


@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_all_combinations(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    errors = torch.rand(4, 3, generator=made, dtype=torch.float64).tolist()
    sizes = torch.randint(1, 30, (4, 3), generator=made).tolist()
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in range(least, most + 1):
        chosen = allocate(errors, sizes, budget)
        assert sum(sizes[b][c] for b, c in enumerate(chosen)) <= budget
        got = sum(errors[b][c] for b, c in enumerate(chosen))
        assert got == pytest.approx(brute_force(errors, sizes, budget), abs=1e-12)
    with pytest.raises(AxiconError, match=f"take {least} bytes, {least - 1} are allowed"):
        allocate(errors, sizes, least - 1)


def test_many_blocks_of_one_shape_take_no_time() -> None:
    errors = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).tolist()
    assert len(allocate(errors, [[300, 400, 600, 800]] * 60, 30_000)) == 60


@pytest.mark.usefixtures("own_cache")
class TestModels:
    def make(self, folder: Path, name: str, **settings: Any) -> Path:
        sample = {"windows": 4, "window": 16, "text": str(folder / "t.txt"), "shared": folder / "shared"}
        sample["inputs"] = settings.pop("inputs", "dense")
        recipe = {
            "model": str(folder / "dense"), "out": folder / name, "threads": 1, "measure": False,
            "compressor": {"method": "gptq", "group": 16} | settings, "calibration": sample,
        }  # fmt: skip
        compress.run(CompressRecipe.model_validate(recipe), Reporter(io.StringIO()))
        return folder / name

    def run(self, *words: object) -> Result:
        return CliRunner().invoke(axicon, ["allocate", *map(str, words)])

    def test_a_recipe_whose_model_has_the_promised_errors_and_bytes(self, tmp_path: Path) -> None:
        saved("llama_grouped", tmp_path / "dense")
        byte_tokenizer().save_pretrained(tmp_path / "dense")
        (tmp_path / "t.txt").write_text("THE LAMP WENT OUT. " * 20)
        models = [self.make(tmp_path, f"bits{bits}", bits=bits) for bits in (2, 4, 8)]
        small, middle, large = map(Uniform.of, models)
        budget = (small.bytes + middle.bytes) // 2
        result = self.run(*models, f"bytes={budget}", f"out={tmp_path / 'mixed.yaml'}")
        assert result.exit_code == 0, result.exception
        recipe = yaml.safe_load((tmp_path / "mixed.yaml").read_text())
        rules = recipe["compressor"]["rules"]
        assert rules
        mixed = tmp_path / "mixed"
        compress.run(
            CompressRecipe.model_validate(recipe | {"out": mixed, "threads": 1, "measure": False}),
            Reporter(io.StringIO()),
        )
        got = (read_manifest(mixed) or {})["calibration"]["block_errors"]
        by_bits = {2: small, 4: middle, 8: large}
        for block in range(len(got)):
            bits = rules.get(f"blocks.{block}.*", recipe["compressor"])["bits"]
            assert got[block] == by_bits[bits].errors[block]
        error = sum(one**2 for one in got)
        assert f"sum of squared block errors {error:.5f}" in result.output
        assert error < sum(small.squares)
        assert f"the best of one setting for all that fits is {models[0]}" in result.output

        assert "allow that, or add a model" in str(self.run(*models, "bytes=1", "out=x").exception)
        assert "name two models" in str(self.run(models[0], "bytes=1", "out=x").exception)
        assert "has other settings in some blocks" in str(
            self.run(models[0], mixed, "bytes=1", "out=x").exception
        )
        sequential = self.make(tmp_path, "sequential", inputs="sequential")
        assert "calibration.inputs=dense" in str(self.run(sequential, mixed, "bytes=1", "out=x").exception)
