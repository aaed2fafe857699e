"""The C++ step against the torch decoder: same logits, and a row's bits are its own."""

from __future__ import annotations

import copy
import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from axicon.compress.group_int4 import GroupInt4
from axicon.compress.walk import Compress
from axicon.generate.attend import Span, StepAttention
from axicon.kernels import native
from axicon.model.cache import KVCache
from axicon.model.decoder import Decoder
from axicon.model.native import NativeDecoder, Rows, why_not
from axicon.model.shape import ModelShape

SIZES = {"vocab_size": 160, "hidden_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 128}
LLAMA = SIZES | {"intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS = {
    "llama": LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral window": LLAMA | {"model_type": "mistral", "sliding_window": 20},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "gpt_neox": SIZES
    | {
        "model_type": "gpt_neox",
        "intermediate_size": 160,
        "num_attention_heads": 3,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
    },
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 160, "num_attention_heads": 3, "word_embed_proj_dim": 96},
}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")


def random_decoder(config: dict[str, object], seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(ModelShape.from_config(config))
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn_like(parameter) * 0.08
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return decoder.to(torch.bfloat16).requires_grad_(False)


def new_cache(decoder: NativeDecoder, rows: int = 1) -> KVCache:
    cache = KVCache([(b.kv_heads, b.head_width) for b in decoder.shape.blocks], torch.bfloat16, 1 << 26)
    for row in range(rows):
        cache.open(row, 128)
    return cache


def feed(
    decoder: NativeDecoder, cache: KVCache, chunks: dict[int, Tensor], keep: bool = True
) -> dict[int, Tensor]:
    """Compute the next tokens of several requests in one step; logits of all of them by request row."""
    request, offset, positions, rows = [], [], [], list(chunks)
    for i, (row, tokens) in enumerate(chunks.items()):
        cache.make_room(row, len(tokens))
        request += [i] * len(tokens)
        offset += range(len(tokens))
        positions += range(cache.rows[row].committed, cache.rows[row].committed + len(tokens))
    logits = decoder.forward(
        Rows(
            torch.cat(list(chunks.values())),
            torch.tensor(positions),
            request,
            offset,
            [cache.rows[row] for row in rows],
            range(len(request)),
        )
    )
    if keep:
        for row, tokens in chunks.items():
            cache.commit(row, range(len(tokens)))
    return dict(zip(rows, logits.split([len(t) for t in chunks.values()]), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_torch_decoder(name: str) -> None:
    """Within what bfloat16 activations cost: nearer to float32 than torch's own bfloat16."""
    decoder = random_decoder(CONFIGS[name])
    tokens = torch.randint(0, 160, (60,), generator=torch.Generator().manual_seed(1))
    in_bf16 = decoder.logits(tokens[None])[0]
    exact = decoder.float().logits(tokens[None])[0]
    fast = NativeDecoder(decoder.to(torch.bfloat16))
    cache = new_cache(fast)
    parts = [feed(fast, cache, {0: part})[0] for part in tokens.split([33, 1, 1, 1, 20, 1, 1, 1, 1])]
    error, allowed = (torch.cat(parts) - exact).abs().max(), (in_bf16 - exact).abs().max()
    assert error <= allowed
    assert error <= 0.01 * exact.abs().max()


def test_bits_do_not_depend_on_the_batch_nor_on_chunks_nor_on_threads() -> None:
    fast = NativeDecoder(random_decoder(CONFIGS["llama"]))
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 160, (40,), generator=generator) for _ in range(11)]
    alone = []
    for text in texts:
        cache = new_cache(fast)
        alone.append(feed(fast, cache, {0: text})[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        cache = new_cache(fast, rows=11)
        got: list[list[Tensor]] = [[] for _ in texts]
        at = [0] * 11
        while any(a < 40 for a in at):
            lengths = torch.randint(0, 9, (11,), generator=generator).tolist()
            chunks = {r: texts[r][at[r] : at[r] + n] for r, n in enumerate(lengths) if n and at[r] < 40}
            for r, logits in (feed(fast, cache, chunks) if chunks else {}).items():
                got[r].append(logits)
                at[r] += len(logits)
    finally:
        torch.set_num_threads(before)
    for one, many in zip(alone, got, strict=True):
        assert torch.equal(one, torch.cat(many))


def test_a_path_through_a_tree_equals_the_sequence() -> None:
    fast = NativeDecoder(random_decoder(CONFIGS["qwen3"]))
    prompt, path, other = torch.arange(10), torch.tensor([3, 4, 5]), torch.tensor([77, 78])
    cache = new_cache(fast, rows=2)
    feed(fast, cache, {0: prompt})
    feed(fast, cache, {1: prompt})
    expected = feed(fast, cache, {0: path}, keep=False)[0]
    # Tree: 3 -> 77 and 3 -> 4 -> 5, with 78 beside 3. Nodes in order 3, 77, 4, 78, 5.
    tokens = torch.tensor([path[0], other[0], path[1], other[1], path[2]])
    sees = [{0}, {0, 1}, {0, 2}, {3}, {0, 2, 4}]
    hidden = np.array([[sum(1 << j for j in range(5) if j not in s)] for s in sees], dtype=np.uint64)
    cache.make_room(1, 5)
    positions = torch.tensor([10, 11, 11, 10, 12])
    rows = Rows(tokens, positions, [0] * 5, range(5), [cache.rows[1]], range(5), hidden)
    logits = fast.forward(rows)
    assert torch.allclose(logits[[0, 2, 4]], expected, atol=1e-5)
    assert not torch.allclose(logits[1], expected[1], atol=1e-2)


def test_a_tree_longer_than_the_window_is_refused() -> None:
    fast = NativeDecoder(random_decoder(CONFIGS["mistral window"] | {"sliding_window": 3}))
    cache = new_cache(fast)
    cache.make_room(0, 4)
    hidden = np.zeros((4, 1), dtype=np.uint64)
    rows = Rows(torch.arange(4), torch.tensor([0, 1, 1, 2]), [0] * 4, range(4), [cache.rows[0]], [3], hidden)
    with pytest.raises(ValueError, match="a tree of more than 3 nodes"):
        fast.forward(rows)


def test_heads_that_kept_different_slots() -> None:
    """After an eviction each head attends to what it kept, as the torch path does over the same cache."""
    decoder = random_decoder(CONFIGS["llama"])
    fast = NativeDecoder(copy.deepcopy(decoder))
    cache = new_cache(fast)
    feed(fast, cache, {0: torch.randint(0, 160, (24,), generator=torch.Generator().manual_seed(3))})
    whole = feed(fast, cache, {0: torch.tensor([7])}, keep=False)[0]
    keep = torch.zeros(2, 24, dtype=torch.bool)
    keep[0, [0, 3, 5, 9, 23]] = True
    keep[1, [1, 2, 20]] = True
    for layer in range(3):
        cache.retain(0, layer, keep)
    got = feed(fast, cache, {0: torch.tensor([7])}, keep=False)[0]
    span = Span(0, 0, 1, (24,), (-1,), False)
    attend = StepAttention([span], [cache.rows[0]])
    expected = decoder.head(decoder(torch.tensor([7]), torch.tensor([24]), attend))
    assert torch.allclose(got, expected, atol=0.04)
    assert not torch.allclose(got, whole, atol=0.04)


@pytest.mark.parametrize("rows", [1, 3, 8, 19])
def test_bf16_product_alone(rows: int) -> None:
    library = native.library()
    torch.manual_seed(4)
    weight, x = torch.randn(48, 64).bfloat16(), torch.randn(rows, 64)
    packed, y = torch.empty_like(weight), torch.empty(rows, 48)
    library.axicon_pack_bf16(weight.data_ptr(), 48, 64, packed.data_ptr())
    linear = native.Linear(native.BF16, 48, 64, 0.0, 0.0, packed.data_ptr(), None, None)
    library.axicon_linear(ctypes.addressof(linear), x.data_ptr(), rows, y.data_ptr(), 2)
    assert torch.allclose(y, x.bfloat16().float() @ weight.float().T, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_codes_of_four_bits_in_every_block(name: str) -> None:
    """Within what int8 activations cost of the same codes through torch, and in less than half the bytes."""
    decoder = random_decoder(CONFIGS[name])
    whole = NativeDecoder(copy.deepcopy(decoder)).weight_bytes
    Compress(GroupInt4(group=32))(decoder)
    tokens = torch.randint(0, 160, (30,), generator=torch.Generator().manual_seed(1))
    want = decoder.logits(tokens[None])[0].float()
    fast = NativeDecoder(decoder)
    got = feed(fast, new_cache(fast), {0: tokens})[0]
    assert (got - want).norm() < 0.02 * want.norm()
    assert fast.weight_bytes < 0.5 * whole


def test_refuses_with_the_reason() -> None:
    small = random_decoder(CONFIGS["opt"] | {"word_embed_proj_dim": 48})
    assert "projects" in str(why_not(small))
    with pytest.raises(ValueError, match="projects"):
        NativeDecoder(small)
    assert "bfloat16" in str(why_not(random_decoder(CONFIGS["llama"]).float()))
