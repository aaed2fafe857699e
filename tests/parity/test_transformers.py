"""Our decoder against transformers: same tiny random weights from the same directory, equal logits in
float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from axicon.model.attention import causal_mask, reference_attention
from axicon.model.checkpoint import load
from axicon.model.decoder import Block, Decoder
from tests.parity import variants

TOLERANCE = 1e-4
LENGTH = 40


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", variants.VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = variants.saved(name, tmp_path)
    ours = load(tmp_path, dtype=torch.float32).logits(tokens())
    theirs = model(tokens()).logits
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    # The comparison means something: the model reacts to its input, and logits are far apart.
    assert theirs.std() > 0.1
    assert (theirs[0] - theirs[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["opt_350m", "llama_tied", "qwen3", "neox"])
@torch.no_grad()
def test_sharded_checkpoint_equals_single(name: str, tmp_path: Path) -> None:
    variants.saved(name, tmp_path / "one")
    variants.saved(name, tmp_path / "many", max_shard_size="20kB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (load(tmp_path / folder, dtype=torch.float32) for folder in ("one", "many"))
    assert torch.equal(one.logits(tokens()), many.logits(tokens()))


class RowCache:
    """The smallest honest cache: per block and request row a list of keys and values, one query at a time."""

    def __init__(self, rows_N: list[int]) -> None:
        self.rows_N = rows_N
        self.kept: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        out = torch.empty_like(q_NHK)
        for n, row in enumerate(self.rows_N):
            kept = self.kept.setdefault((block.index, row), [])
            kept.append((k_NGK[n], v_NGK[n]))
            k_SGK, v_SGK = (torch.stack(x) for x in zip(*kept, strict=True))
            mask_1S = causal_mask(len(kept), block.window)[-1:]
            out[n] = reference_attention(q_NHK[n : n + 1], k_SGK, v_SGK, mask_1S, block.scale)[0]
        return out


@pytest.mark.parametrize("name", ["opt", "opt_350m", "llama_grouped", "mistral_window", "qwen3", "neox"])
@torch.no_grad()
def test_packed_steps_of_interleaved_requests_equal_whole_sequences(name: str, tmp_path: Path) -> None:
    """Three requests advance by different chunks in the same steps; each ends where it would alone."""
    variants.saved(name, tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    texts = tokens(3)
    chunks = {0: [1] * LENGTH, 1: [7, 1, 1, 20, 11], 2: [LENGTH]}
    done = dict.fromkeys(chunks, 0)
    cache = RowCache([])
    logits: dict[int, list[Tensor]] = {row: [] for row in chunks}
    for step in range(LENGTH):
        nodes = []
        for row, sizes in chunks.items():
            if step < len(sizes):
                nodes += [(row, position) for position in range(done[row], done[row] + sizes[step])]
                done[row] += sizes[step]
        cache.rows_N = [row for row, _ in nodes]
        tokens_N = torch.stack([texts[row, position] for row, position in nodes])
        positions_N = torch.tensor([position for _, position in nodes])
        logits_NV = decoder.head(decoder(tokens_N, positions_N, cache))
        for (row, _), row_logits in zip(nodes, logits_NV, strict=True):
            logits[row].append(row_logits)
    packed = torch.stack([torch.stack(logits[row]) for row in chunks])
    torch.testing.assert_close(packed, decoder.logits(texts), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["opt_350m", "llama_tied", "llama", "neox_tied"])
@torch.no_grad()
def test_stages_in_a_row_equal_the_whole(name: str, tmp_path: Path) -> None:
    """A model cut into three stages, each loading only its own weights."""
    variants.saved(name, tmp_path)
    whole = load(tmp_path, dtype=torch.float32)
    stages = [load(tmp_path, dtype=torch.float32, blocks=range(i, i + 1)) for i in range(3)]
    assert [hasattr(s, "embed_tokens") for s in stages] == [True, False, False]
    assert [hasattr(s, "lm_head") for s in stages] == [False, False, True]
    x = tokens(1)[0]
    positions_N = torch.arange(LENGTH)
    for stage in stages:
        x = stage(x, positions_N, RowCache([0] * LENGTH))
    torch.testing.assert_close(stages[-1].head(x), whole.logits(tokens(1))[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama_grouped", "mistral_window", "neox", "neox_sequential"])
@torch.no_grad()
def test_bfloat16_stays_close_to_transformers_in_bfloat16(name: str, tmp_path: Path) -> None:
    """No equality here, but the same distance from float32 as transformers has."""
    model = variants.saved(name, tmp_path)
    exact = model(tokens()).logits
    ours = (load(tmp_path, dtype=torch.bfloat16).logits(tokens()) - exact).square().mean().sqrt()
    theirs = (model.bfloat16()(tokens()).logits.float() - exact).square().mean().sqrt()
    assert ours < 1.2 * theirs


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    """Finetuning uses the same modules; serving before must not spoil the tables it needs."""
    variants.saved("qwen3", tmp_path)
    decoder: Decoder = load(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        decoder.logits(tokens())
    decoder.requires_grad_(True)
    decoder.logits(tokens()).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())


@torch.no_grad()
def test_greedy_text_follows_transformers(tmp_path: Path) -> None:
    model = variants.saved("llama_llama3", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    ids = tokens(1)[:, :5]
    expected = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(30):
        ids = torch.cat([ids, decoder.logits(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)
