"""Prompt in chunks, then tokens one by one, through the runner and its cache, against transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from axicon.generate.runner import LocalRunner
from axicon.model.checkpoint import load
from axicon.model.native import why_not
from tests.parity import variants

TEXT = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(9)).tolist()
CHUNKS = (16, 11, *(1,) * 13)


def through_the_cache(runner, make_step):
    """Logits of all 40 tokens."""
    out, start, commits = [], 0, ()
    for size in CHUNKS:
        nodes = [(TEXT[start + i], start + i, 0, i - 1) for i in range(size)]
        reserves = () if start else ((0, 64),)
        step = make_step(nodes, forced=size > 1, commits=commits, reserves=reserves)
        out.append(runner.forward(step).logits_WV)
        start, commits = start + size, tuple(range(size))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["neox", "neox_sequential", "neox_whole_rotary", "mistral_window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_chunks_and_decode_equal_transformers(name, dtype, tmp_path: Path, make_step):
    model = variants.saved(name, tmp_path)
    exact = model(torch.tensor([TEXT])).logits[0]
    runner = LocalRunner(load(tmp_path, dtype=dtype), kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    ours = through_the_cache(runner, make_step)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)
    else:
        theirs = model.to(dtype)(torch.tensor([TEXT])).logits[0].float()
        assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("name", "reason"), [("neox", "side by side"), ("neox_sequential", "only some channels of a head rotate")]
)
def test_what_the_kernels_cannot_run_runs_in_torch_and_says_so(name, reason, tmp_path: Path, caplog):
    variants.saved(name, tmp_path)
    decoder = load(tmp_path)
    assert reason in why_not(decoder)
    with caplog.at_level(logging.WARNING, "axicon"):
        runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, kernels="auto")
    assert runner.native is None
    assert f"steps run in torch, slower than the C++ kernels, because {why_not(decoder)}" in caplog.text
