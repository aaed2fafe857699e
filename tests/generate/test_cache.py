"""Slots, positions and bytes: the cache against a list of tensors, and attention over what it holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axicon.generate.attend import StepAttention
from axicon.generate.spans import Span
from axicon.model.attention import reference_attention
from axicon.model.cache import SMALLEST, ExtentPool, KVCache, size_class
from axicon.model.variant import PLAIN

G, H, K = 2, 6, 8


def new_cache(budget=1 << 20, layers=1):
    return KVCache([(G, K)] * layers, torch.float64, budget)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_size_classes_waste_at_most_a_quarter_of_a_long_extent():
    classes = sorted({size_class(n) for n in range(1, 5000)})
    assert classes[:9] == [64, 96, 128, 160, 192, 224, 256, 320, 384]
    for n in range(1, 5000):
        capacity = size_class(n)
        assert n <= capacity
        assert capacity % 16 == 0
        assert n <= SMALLEST or capacity - n < max(32, n / 4)
    assert all(size_class(c) == c for c in classes)


def test_pool_counts_bytes_and_stays_within_its_budget():
    one = 2 * G * 64 * K * 8
    pool = ExtentPool(3 * one, torch.float64)
    extents = [pool.take(G, 64, K) for _ in range(3)]
    assert pool.bytes_in_use == 3 * one
    with pytest.raises(MemoryError):
        pool.take(G, 64, K)
    pointer = extents[2].data_ptr()
    pool.give(extents.pop())
    assert (pool.bytes_in_use, pool.bytes_idle) == (2 * one, one)
    assert pool.take(G, 64, K).data_ptr() == pointer
    pool.give(extents.pop())
    with pytest.raises(MemoryError):
        pool.take(G, 128, K)
    pool.give(extents.pop())
    pool.take(G, 128, K)
    assert (pool.bytes_in_use, pool.bytes_idle) == (3 * one, 0)


def test_reserving_more_than_there_is_fails_and_growth_never_exceeds_the_budget():
    cache = new_cache(budget=64 * 1024, layers=3)
    assert cache.slots * cache.bytes_per_slot * 4 // 3 <= 64 * 1024
    cache.open(0, cache.slots // 64 * 64)
    with pytest.raises(ValueError, match="reserves"):
        cache.open(1, 64)
    for tokens in range(1, cache.rows[0].reserved + 1):
        cache.make_room(0, 1)
        cache.rows[0].layers[0].stage(random(1, G, K), random(1, G, K), tokens - 1)
        cache.commit(0, [0])
    with pytest.raises(ValueError, match="reserved"):
        cache.make_room(0, 1)
    cache.release(0)
    assert cache.bytes_in_use == 0


@given(data=st.data())
def test_staging_committing_and_retaining_equal_plain_lists(data):
    """Any sequence of trees, accepted paths and evictions: per head the kept (position, key) pairs, in
    order.
    """
    cache = new_cache(budget=4 << 20)
    cache.open(0, 400)
    row = cache.rows[0]
    model = [[] for _ in range(G)]
    time = 0
    for step in range(data.draw(st.integers(1, 8))):
        tokens = data.draw(st.integers(1, 40))
        keys = random(tokens, G, K, seed=step)
        cache.make_room(0, tokens)
        row.layers[0].stage(keys, -keys, row.committed)
        path = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens)))
        if path:
            cache.commit(0, path)
        for depth, node in enumerate(path):
            for g in range(G):
                model[g].append((time + depth, keys[node, g]))
        time += len(path)
        longest = max(len(m) for m in model)
        if longest and data.draw(st.booleans()):
            keep = torch.rand(G, longest, generator=torch.Generator().manual_seed(step)) < 0.6
            keep[:, 0] = True
            cache.retain(0, 0, keep)
            model = [[pair for s, pair in enumerate(m) if keep[g, s]] for g, m in enumerate(model)]
        store = row.layers[0]
        assert row.committed == time
        assert store.extent.nbytes == cache.bytes_in_use
        assert row.room == store.capacity - max(len(m) for m in model)
        for g, held in enumerate(model):
            count = len(held)
            if store.lengths is None:
                assert count == time
            else:
                assert store.lengths[g] == count
                assert store.positions_GC[g, :count].tolist() == [p for p, _ in held]
            want = torch.stack([key for _, key in held]) if held else torch.empty(0, K, dtype=torch.float64)
            assert torch.equal(store.keys_GCK[g, :count], want)
            assert torch.equal(store.values_GCK[g, :count], -want)
    cache.release(0)
    assert cache.bytes_in_use == 0


def attend_to_one_head(q_TK, held, k_TK, v_TK, positions, sees_TT, window, scale):
    """Reference for one query head: held (position, key, value) triples, then the step's own nodes."""
    keys = torch.stack([*(k for _, k, _ in held), *k_TK])
    values = torch.stack([*(v for _, _, v in held), *v_TK])
    where = torch.tensor([*(p for p, _, _ in held), *positions])
    mask = torch.ones(len(q_TK), len(where), dtype=torch.bool)
    mask[:, len(held) :] = sees_TT
    if window is not None:
        mask &= where[None] > torch.tensor(positions)[:, None] - window
    return reference_attention(q_TK[:, None], keys[:, None], values[:, None], mask, scale)[:, 0]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("parents", [(-1,), (-1, 0, 1, 2), (-1, -1, 0, 0, 3)])
def test_attention_over_whole_and_evicted_rows(window, evicted, parents):
    cache = new_cache()
    cache.open(0, 64)
    row = cache.rows[0]
    past_k, past_v = random(20, G, K, seed=1), random(20, G, K, seed=2)
    row.layers[0].stage(past_k, past_v, 0)
    cache.commit(0, list(range(20)))
    kept = [list(range(20))] * G
    if evicted:
        keep = torch.zeros(G, 20, dtype=torch.bool)
        kept = [[0, 3, 16, 17, 19], [1, 2, 4, 5, 6, 7, 18]]
        for g in range(G):
            keep[g, kept[g]] = True
        cache.retain(0, 0, keep)
    tokens = len(parents)
    positions = []
    for parent in parents:
        positions.append(20 if parent < 0 else positions[parent] + 1)
    span = Span(0, 0, tokens, tuple(positions), parents, forced=False)
    q, k, v = random(tokens, H, K, seed=3), random(tokens, G, K, seed=4), random(tokens, G, K, seed=5)
    block = SimpleNamespace(index=0, scale=0.3, window=window, variant=PLAIN)
    got = StepAttention([span], [row])(block, q, k, v)
    sees = span.ancestors()
    for head in range(H):
        g = head // (H // G)
        held = [(p, past_k[p, g], past_v[p, g]) for p in kept[g]]
        want = attend_to_one_head(q[:, head], held, k[:, g], v[:, g], positions, sees, window, 0.3)
        torch.testing.assert_close(got[:, head], want, rtol=1e-5, atol=1e-6)
    longest = max(len(slots) for slots in kept) + tokens
    assert row.layers[0].capacity >= longest


def test_decode_rows_anywhere_in_a_step_and_padding():
    """Rows of several requests, mixed with a chunk and padding, equal each request attended to by itself."""
    cache = new_cache()
    block = SimpleNamespace(index=4, scale=0.3, window=None, variant=PLAIN)
    for row, length in ((0, 7), (1, 11), (2, 3)):
        cache.open(row, 64)
        cache.rows[row].layers[0].stage(random(length, G, K, seed=row), random(length, G, K, seed=9 + row), 0)
        cache.commit(row, list(range(length)))
    chunk = Span(1, 0, 3, (11, 12, 13), (-1, 0, 1), forced=True)
    spans = [chunk, Span(0, 3, 4, (7,), (-1,), forced=False), Span(2, 4, 5, (3,), (-1,), forced=False)]
    rows = [cache.rows[span.row] for span in spans]
    q, k, v = random(8, H, K, seed=30), random(8, G, K, seed=40), random(8, G, K, seed=50)
    got = StepAttention(spans, rows, first=4)(block, q, k, v)
    assert torch.equal(got[5:], torch.zeros(3, H, K, dtype=torch.float64))
    for span, row in zip(spans, rows, strict=True):
        own = slice(span.start, span.stop)
        alone = Span(span.row, 0, len(span), span.positions, span.parents, span.forced)
        assert torch.equal(got[own], StepAttention([alone], [row], first=4)(block, q[own], k[own], v[own]))
