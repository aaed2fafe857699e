"""The kernels for AVX2, on processors that have AVX-512 too; on others the other tests run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axicon.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not native.cpu_flags() >= native.WIDE_FLAGS, reason="the kernels here are those for AVX2")
def test_the_narrow_kernels_pass_the_tests_of_the_wide_ones() -> None:
    names = ("model/test_native", "model/test_int8", "model/test_tiled_sparse", "kernels/test_sampling")
    files = [f"tests/{name}.py" for name in names]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=os.environ | {"AXICON_INSTRUCTIONS": "avx2"}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:]
    assert " passed" in run.stdout


def test_the_kernels_for_one_width_are_not_those_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: native.WIDE_FLAGS | native.NARROW_FLAGS)
    compiler, wide = native.library_file()
    assert native.instructions() == "AVX-512"
    monkeypatch.setenv("AXICON_INSTRUCTIONS", "avx2")
    assert native.instructions() == "AVX2"
    assert native.library_file() == (compiler, wide.with_name(native.library_file()[1].name))
    assert native.library_file()[1] != wide


def test_a_processor_without_either_is_named_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(native.Unavailable, match="the processor lacks f16c, fma"):
        native.library_file()
