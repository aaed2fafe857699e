"""PagedRunner against LocalRunner and the simulations of its tests: on a CPU, where torch computes what the
kernels do on a GPU, with steps as they come and through the static buffers that a graph would read.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from axicon.errors import AxiconError
from axicon.generate.build import build_engine
from axicon.generate.draftmodel import DraftModel
from axicon.generate.engine import Engine
from axicon.generate.eviction import KV_POLICIES, METHODS
from axicon.generate.paged import PagedRunner
from axicon.generate.paged_step import ancestor_words, pack
from axicon.generate.request import KVSettings, Limits, Request, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.generate.spans import Span
from axicon.generate.speculate import Speculator
from axicon.kernels.paged_attention import PAGE
from axicon.model.pages import PagedCache
from axicon.step import RowPolicy
from tests.generate import test_bounded as bounded
from tests.generate.test_runner import TEXT, chain

SETTINGS = {"kv_bytes": 8 << 20, "max_rows": 4, "prefill_chunk": 16}


def again(compute):
    """The stand-in of a graph: computes from the same buffers."""
    compute()
    return compute


def paged(decoder, graphs=False, **more):
    return PagedRunner(decoder, **{**SETTINGS, **more}, graphs=graphs, capture=again)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def whole(runner):
    """Every page is free, or belongs to one head or block, and the device knows the table."""
    cache = runner.paged
    cache.sync()
    table, counts = cache._table, cache._counts
    entries = np.arange(table.shape[3])
    owned = entries < counts[..., None]
    assert (table[~owned] == 0).all()
    assert np.array_equal(cache.pages.table_RLGM.cpu().numpy(), table)
    assert np.array_equal(cache.pages.lengths_RLG.cpu().numpy(), cache._lengths)
    assert (counts * PAGE >= cache._lengths).all()
    for row in cache.rows.values():
        assert row.bytes == counts[row.index].sum() * cache._page_bytes
    blocks = [pages.ravel() for pages in cache._block_pages.values()]
    pages = np.concatenate([table[owned], cache._free[: cache._left], *blocks])
    assert np.array_equal(np.sort(pages), np.arange(1, len(cache._free) + 1))
    return runner


def mixed_steps(make_step):
    """Chunks, decode rows, trees, a path that is no prefix, a row that takes another's place."""
    tree = [(5, 32, 0, -1), (6, 32, 0, -1), (7, 33, 0, 0), (8, 33, 0, 0), (9, 34, 0, 3), (11, 20, 7, -1)]
    return [
        make_step(chain(TEXT[:30], 0), forced=True, reserves=((0, 64),)),
        make_step(
            [*chain(TEXT[30:32], 0, 30), *chain(TEXT[:20], 7, base=2)],
            forced=True, commits=tuple(range(30)), reserves=((7, 64),)),
        make_step(tree, commits=tuple(range(22))),
        make_step([(5, 35, 0, -1), (11, 21, 7, -1)], commits=(0, 3, 4, 5)),
        make_step([(12, 36, 0, -1), (13, 22, 7, -1)], commits=(0, 1)),
        make_step(
            [(14, 23, 7, -1), *chain(TEXT[:9], 2, base=1)],
            commits=(0, 1), releases=(0,), reserves=((2, 32),)),
        make_step(releases=(2, 7)),
    ]  # fmt: skip


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_equal_those_over_extents(make_decoder, make_step, window, graphs) -> None:
    config = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    decoder = make_decoder(**config)
    ours, theirs = paged(decoder, graphs), LocalRunner(decoder, **SETTINGS)
    for step in mixed_steps(make_step):
        close(ours.forward(step).logits_WV, theirs.forward(step).logits_WV)
        whole(ours)
    assert ours.cache.bytes_in_use == 0
    # The chunks have one for themselves; steps of 2 nodes share one.
    assert ours.graphs is None or len(ours.graphs) == 4


@pytest.mark.parametrize(
    ("name", "model", "graphs"),
    [
        *((name, "llama", True) for name in (*KV_POLICIES, "h2o mean", "h2o decay")),
        ("h2o", "sliding window", True),
        ("tova", "llama", False),
    ],
)
def test_every_policy_equals_the_simulation(
    make_decoder, make_step, monkeypatch, model, name, graphs
) -> None:
    decoder = bounded.new_decoder(make_decoder, model, torch.float64)
    policy = bounded.settings(name)
    simulated = bounded.Simulation(decoder, policy)
    want, want_kept = simulated.run()
    monkeypatch.setattr(bounded, "held", held)
    runner = paged(decoder, graphs)
    got, got_kept = bounded.drive(runner, make_step, policy)
    assert got_kept == want_kept
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    gone = sum(len(at) for layer in want_kept[-1] for at in layer)
    heads = sum(len(layer) for layer in want_kept[-1])
    assert runner._bounded[0].evicted == heads * (bounded.PROMPT + bounded.ANSWER) - gone
    runner.forward(make_step(releases=(0,)))
    assert whole(runner).cache.bytes_in_use == 0


def held(runner, row=0):
    layers = range(len(runner.paged.shapes))
    return [
        [layer.positions(n)[g].tolist() for g, n in enumerate(layer.lengths.tolist())]
        for layer in whole(runner).paged.dense(row, layers)
    ]


@pytest.mark.parametrize("graphs", [False, True])
def test_wrong_guesses_leave_no_trace(decoder64, make_step, monkeypatch, graphs) -> None:
    monkeypatch.setattr(bounded, "held", held)
    monkeypatch.setattr(bounded, "LocalRunner", lambda decoder, **_: paged(decoder, graphs))
    bounded.test_wrong_guesses_leave_no_trace(decoder64, make_step)


def test_one_layer_at_most_is_whole(make_decoder, make_step, monkeypatch) -> None:
    decoder = make_decoder(torch.float64, num_hidden_layers=6)
    runner = paged(decoder, kv_bytes=64 << 20, prefill_chunk=64)
    length, budget, peak = 400, 40, 0
    take = runner.paged._take

    def watched(count):
        nonlocal peak
        pages = take(count)
        peak = max(peak, runner.cache.bytes_in_use)
        return pages

    monkeypatch.setattr(runner.cache, "_take", watched)
    policy = RowPolicy(0, METHODS.index("h2o"), budget, 20, 4, 16)
    text = [(2 + i % 90, i, 0, i - 1) for i in range(length)]
    runner.forward(make_step(text, forced=True, reserves=((0, 56),), policies=(policy,), layered=((0, 6),)))
    one = runner.cache.bytes_per_slot // 6
    assert runner.cache.bytes_in_use == 6 * one * 48  # 40 slots are three pages
    assert peak == 5 * one * 48 + one * length
    assert runner.cache.bytes_in_use < runner.cache.slots_reserved * runner.cache.bytes_per_slot


def test_text_of_an_engine_is_the_same(decoder64, letters) -> None:
    """Prompts of several chunks, sampled and greedy, with guesses, bounded, more than fit at once."""

    def texts(make):
        runner, drafter = make(), make()
        engine = Engine(
            runner, letters, eos_ids=[1], limits=Limits(kv_floor=8),
            speculator=Speculator(DraftModel(drafter), always=True),
        )  # fmt: skip
        for i in range(7):
            guesses = Speculation(method=("lookup", "rsd_s")[i % 2]) if i % 3 else None
            params = SamplingParams(
                max_tokens=20, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True,
                speculation=guesses,
            )  # fmt: skip
            kv = KVSettings(policy=("h2o", "tova")[i % 2], budget=0.4) if i in (1, 4) else None
            engine.add(Request(id=str(i), prompt=(TEXT * 3)[i : i + 20 + 9 * i], params=params, kv=kv))
        found: dict[str, list[int]] = {}
        while engine.has_work:
            for d in engine.step():
                assert d.error is None
                found.setdefault(d.request_id, []).extend(d.tokens)
        return found, runner, drafter

    found, runner, drafter = texts(lambda: paged(decoder64, graphs=True))
    assert found == texts(lambda: LocalRunner(decoder64, **SETTINGS))[0]
    for one in (runner, drafter):
        assert whole(one).cache.bytes_in_use == 0
        assert 1 < len(one.graphs) < 20


def test_a_prompt_takes_over_what_an_earlier_one_left(decoder64, letters) -> None:
    texts = []
    for runner, share in ((paged(decoder64), 0.0), (paged(decoder64, True), 0.5)):
        engine = Engine(runner, letters, eos_ids=[1], limits=Limits(prefix_cache=share))
        texts.append([])
        for i in range(3):
            params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            engine.add(Request(id=str(i), prompt=[*(TEXT * 4)[:140], 7 + i], params=params))
            while engine.has_work:
                texts[-1] += [token for d in engine.step() for token in d.tokens]
            whole(runner)
    assert texts[0] == texts[1]
    assert runner.cache.slots_kept == 128
    assert engine.stats().prefixes.reused_total == 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
def test_graphs_on_a_gpu(make_decoder, make_step, window) -> None:
    """Replayed steps, launched ones, and what the CPU computes. Padding changes how products are summed."""
    config = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    runners = [
        PagedRunner(
            make_decoder(torch.float32, **config).to(device), **SETTINGS, graphs=graphs, capture=capture
        )
        for device, graphs, capture in (("cpu", False, None), ("cuda", False, None), ("cuda", True, None))
    ]
    for step in mixed_steps(make_step):
        on_cpu, launched, replayed = (runner.forward(step).logits_WV for runner in runners)
        torch.testing.assert_close(replayed, launched, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(launched, on_cpu, rtol=1e-3, atol=1e-3)
    assert len(runners[2].graphs) > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*KV_POLICIES, "h2o decay"])
def test_policies_on_a_gpu(make_decoder, make_step, monkeypatch, name) -> None:
    monkeypatch.setattr(bounded, "held", held)
    found = [
        bounded.drive(
            PagedRunner(make_decoder(torch.float32).to(device), **SETTINGS, graphs=device == "cuda"),
            make_step, bounded.settings(name),
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)


def test_blocks_outlive_their_row() -> None:
    cache = PagedCache([(2, 8)] * 3, torch.float32, 1 << 20, device=torch.device("cpu"), max_rows=2)
    cache.open(5, 64)
    cache.make_room(5, 40)
    cache.sync()
    layers = range(3)
    cache.grow(5, layers, 40)
    cache.rows[5].committed = 40
    place = cache._all_places(5, layers)
    cache.pages.keys_PSK.view(-1, 8)[place] = torch.randn(3, 2, 40, 8)
    cache.pages.positions_PS.view(-1)[place] = torch.arange(40, dtype=torch.int32).expand(3, 2, -1)
    want = [layer.keys_GCK.clone() for layer in cache.dense(5, layers)]
    cache.keep(1, 5, 0, 16)
    cache.keep(2, 5, 16, 40)
    assert cache.bytes_kept == cache.bytes_per_slot * (16 + 32)
    cache.release(5)
    assert cache.bytes_in_use == cache.bytes_kept
    cache.open(0, 64)
    cache.reuse(0, [1, 2])
    assert cache.rows[0].committed == 40
    for layer, keys in zip(cache.dense(0, layers), want, strict=True):
        assert torch.equal(layer.keys_GCK, keys)
        assert layer.positions(40)[1].tolist() == list(range(40))
    cache.drop(1)
    cache.drop(2)
    cache.drop(3)
    cache.release(0)
    assert cache.bytes_in_use == cache.slots_kept == 0


def test_the_table_grows_with_its_rows(make_decoder, make_step) -> None:
    """Beyond 64 pages of a head; graphs of the old table are forgotten."""
    decoder = make_decoder(max_position_embeddings=2048)
    ours, theirs = (
        kind(decoder, **{**SETTINGS, "prefill_chunk": 512}, **more)
        for kind, more in ((PagedRunner, {"capture": again}), (LocalRunner, {}))
    )
    text = [2 + i % 91 for i in range(1100)]
    outs = []
    for runner in (ours, theirs):
        out, commits = [], ()
        for start, stop in itertools.pairwise((0, 512, 1020, 1023, 1024, 1025, 1026)):
            step = make_step(
                chain(text[start:stop], 0, start), forced=True, commits=commits,
                reserves=((0, 1100),) if start == 0 else ())  # fmt: skip
            out.append(runner.forward(step).logits_WV)
            commits = tuple(range(stop - start))
        outs.append(torch.cat(out))
    close(*outs)
    assert whole(ours).paged._table.shape[3] == 128
    assert ours.paged.version == 1
    assert len(ours.graphs) == 1


def test_no_more_than_there_is(decoder64, make_step) -> None:
    runner = paged(decoder64, kv_bytes=300_000)
    slots = runner.capacity.slots
    assert slots % PAGE + slots > 0
    assert runner.paged._page_bytes * (len(runner.paged._free) + 1) <= 300_000
    with pytest.raises(ValueError, match="slots reserved, the cache holds"):
        runner.forward(make_step(reserves=((0, slots // 2), (1, slots // 2), (2, slots // 4))))
    runner.forward(make_step([(5, 0, 0, -1)], reserves=((0, 64),)))
    with pytest.raises(ValueError, match=r"reserved 64 slots and now needs 65"):
        runner.cache.make_room(0, 65)
    with pytest.raises(MemoryError, match="more pages do not fit"):
        runner.cache.make_room(0, 100_000, range(2))
    whole(runner)


def test_warming_up_leaves_nothing(decoder64, make_step) -> None:
    runner = paged(decoder64, graphs=True)
    runner.warm_up()
    assert len(runner.graphs) == 3  # of 1, 2 and 4 rows
    assert whole(runner).cache.bytes_in_use == 0
    assert runner.forward(make_step([(5, 0, 0, -1)], reserves=((0, 64),))).logits_WV.isfinite().all()
    assert runner.describe()["cache"] == "pages"
    assert runner.fingerprint != LocalRunner(decoder64, **SETTINGS).fingerprint
    assert runner.capacity.free_chunks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu() -> None:
    with pytest.raises(AxiconError, match="device=cuda: torch finds no CUDA device here"):
        build_engine("demo", device="cuda")


def test_layers_must_be_alike(decoder64) -> None:
    with pytest.raises(AxiconError, match="equal KV heads in all layers"):
        PagedCache([(2, 8), (3, 8)], torch.float32, 1 << 20, device=torch.device("cpu"), max_rows=2)


def test_ancestors_are_bits() -> None:
    tree = Span(0, 0, 40, (0,) * 40, (-1, *[i // 2 for i in range(39)]), False)
    words = ancestor_words(tree, 2)
    sees = ((words[:, :, None] >> np.arange(32)) & 1).reshape(40, 64)
    assert np.array_equal(sees[:, :40].astype(bool), tree.ancestors().numpy())
    assert not sees[:, 40:].any()
    line = Span(0, 0, 40, tuple(range(40)), tuple(range(-1, 39)), True)
    assert np.array_equal(
        ancestor_words(line, 2), ancestor_words(Span(0, 0, 40, (0,) * 40, line.parents, False), 2)
    )


@pytest.mark.parametrize("count", [1, 3, 8])
def test_steps_of_a_bucket_have_one_layout(count) -> None:
    """Whatever their rows and lengths, and padding belongs to nobody."""
    spans = [Span(i, i, i + 1, (30 + i,), (-1,), False) for i in range(count)]
    packed = pack(range(count), spans, range(count), [30] * count, 3, nobodys=9)
    other = pack(range(count), spans, range(count)[::-1], [200] * count, 3, nobodys=9)
    assert packed.layout == other.layout
    assert packed.layout.padded
    assert packed.layout.nodes == 1 << (count - 1).bit_length()
    tokens_N, _, nodes = packed.views(torch.from_numpy(packed.flat))
    assert tokens_N.tolist()[:count] == list(range(count))
    assert nodes.rows_N.tolist()[count:] == [9] * (packed.layout.nodes - count)
    assert (nodes.groups[0].tiles_T4[:, 0] == nodes.rows_N).all()
    assert pack(range(count), spans, range(count), [300] * count, 3, nobodys=9).layout != packed.layout
    chunk = Span(0, 0, 100, tuple(range(100)), tuple(range(-1, 99)), True)
    assert not pack([0] * 100, [chunk], [0], [0], 3, nobodys=9).layout.padded
