"""Blocks that come and go: the bits of the run in memory, once per step, never more of them than buffers."""

from __future__ import annotations

import errno
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.compress import COMPRESSORS
from axicon.data.batch import Batch
from axicon.errors import AxiconError, RunFailed
from axicon.finetune.blockstore import FileStore, HostStore, Store
from axicon.finetune.footprint import predict
from axicon.finetune.objectives.choice import Choice
from axicon.finetune.objectives.language import Language
from axicon.finetune.offload import Offload, offload, ring_of
from axicon.finetune.shards import Alone
from axicon.finetune.updates.zo2 import ZO2
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.model.adapters import Full, Lora
from axicon.model.decoder import Decoder
from axicon.model.int8 import Int8Linear
from axicon.model.shape import ModelShape
from axicon.protocols import Moment, Objective, Scalars
from tests.finetune.small import LLAMA, OPT, decoder, source

DEEP = {"num_hidden_layers": 5}
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}


def at(step: int) -> Moment:
    return Moment(step, 7, 1 - 0.2 * step)


def key(*what: str | int) -> int:
    return Moment(0, 3).key(*what)


def run(
    rule: ZoSGD, model: Decoder, steps: int = 4, shards: int = 2, objective: Objective | None = None
) -> list[Scalars]:
    data, found = source(), []
    rule.prepare(model)
    for step in range(steps):
        scalars = rule.measure(model, objective or Language(), data.batch(step), Alone(shards), at(step))
        rule.apply(model, scalars, at(step))
        found.append(scalars)
    return found


def weights(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watched:
    """A store that says what is done to it, and takes its time."""

    def __init__(self, store: Store, seed: int = 0) -> None:
        self.store, self.events, self.random = store, [], random.Random(seed)
        self.events: list[tuple[str, int]]

    def add(self, content: Tensor) -> None:
        self.store.add(content)

    def read(self, block: int, into: Tensor) -> None:
        time.sleep(self.random.random() * 2e-3)
        self.events.append(("read", block))
        self.store.read(block, into)

    def write(self, block: int, content: Tensor) -> None:
        time.sleep(self.random.random() * 2e-3)
        self.events.append(("write", block))
        self.store.write(block, content)

    def close(self) -> None:
        self.store.close()


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": False, "buffers": 2},
        {"write_every": 1},
        {"write_every": 3, "queries": 2},
        {"one_sided": True, "share": 0.5, "resample": 2},
    ],
    ids=str,
)
def test_numbers_and_weights_are_those_in_memory(
    config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = decoder(config | DEEP), decoder(config | DEEP)
    Full().install(ours, key)
    Full().install(theirs, key)
    plain = {k: v for k, v in settings.items() if k not in ("overlap", "buffers", "write_every")}
    before = weights(theirs)
    expected = run(ZoSGD(**SETTINGS, **plain), theirs)
    rule = ZO2(**SETTINGS, **settings, folder=tmp_path)
    assert run(rule, ours) == expected
    rule.finish(ours)
    assert same(weights(ours), weights(theirs))
    assert not same(weights(ours), before)
    assert ours.lm_head.weight is ours.embed_tokens.weight, "what is shared stays shared, and moved once"
    assert ring_of(ours) is None
    assert not any(block._forward_hooks for block in ours.blocks)


def test_a_whole_model_that_is_looked_at_between_steps_is_up_to_date() -> None:
    ours, theirs = decoder(LLAMA | DEEP), decoder(LLAMA | DEEP)
    Full().install(ours, key)
    Full().install(theirs, key)
    rule, plain = ZO2(**SETTINGS, write_every=4), ZoSGD(**SETTINGS)
    tokens = torch.arange(10)[None]
    rule.prepare(ours)
    plain.prepare(theirs)
    for step in range(3):
        for one, model in ((rule, ours), (plain, theirs)):
            batch = source().batch(step)
            one.apply(model, one.measure(model, Language(), batch, Alone(), at(step)), at(step))
        with torch.no_grad():
            assert torch.equal(ours.logits(tokens), theirs.logits(tokens))
    ring = ring_of(ours)
    assert ring is not None
    ring.flush()
    out = ring.traffic.blocks_out
    ring.flush()
    assert ring.traffic.blocks_out == out, "nothing is left to do"


def test_a_log_is_replayed_in_one_visit_to_each_block() -> None:
    ours, theirs = decoder(LLAMA | DEEP), decoder(LLAMA | DEEP)
    Full().install(ours, key)
    Full().install(theirs, key)
    log = run(ZoSGD(**SETTINGS), theirs, steps=6)
    rule = ZO2(**SETTINGS)
    rule.prepare(ours)
    ring = ring_of(ours)
    assert ring is not None
    for step, scalars in enumerate(log):
        rule.apply(ours, scalars, at(step))
    assert ring.traffic.blocks_in == 0
    ring.flush()
    assert 5 <= ring.traffic.blocks_in <= 5 + 2, "the first two begin to come again, for what may be next"
    rule.finish(ours)
    assert same(weights(ours), weights(theirs))


def test_a_block_comes_once_per_step_and_goes_back_in_its_turn(tmp_path: Path) -> None:
    model = decoder(OPT | {"num_hidden_layers": 8})
    Full().install(model, key)
    store = Watched(FileStore(tmp_path))
    ring = offload(model, store, write_every=4)
    rule = ZO2(**SETTINGS)
    run(rule, model, steps=8, shards=4)
    reads = [block for kind, block in store.events if kind == "read"]
    assert reads[: 8 * 8] == list(range(8)) * 8, "in order, once each"
    writes = [block for kind, block in store.events if kind == "write"]
    assert len(writes) == 7 * 8 // 4, "seven updates came by, a quarter of the blocks went back each time"
    assert ring.ring_bytes == 3 * ring.stored_bytes // 8
    outside = sum(p.numel() * 4 for p in ring.resident().values())
    held = sum(p.numel() * 4 for p in model.parameters())
    assert held == outside, "outside of its visit a block has no memory"
    rule.finish(model)
    assert ring_of(model) is ring, "who made the ring keeps it"
    stored = ring.stored_bytes
    ring.restore()
    assert ring.traffic.bytes_in == sum(kind == "read" for kind, _ in store.events) * stored // 8


def test_adapters_stay_and_what_is_beneath_them_never_goes_back() -> None:
    ours, theirs = decoder(LLAMA | DEEP), decoder(LLAMA | DEEP)
    for model in (ours, theirs):
        Lora(r=2).install(model, key)
    store = Watched(HostStore())
    ring = offload(ours, store)
    rule = ZO2(lr=0.1, eps=1e-2)
    assert run(rule, ours) == run(ZoSGD(lr=0.1, eps=1e-2), theirs)
    assert not [block for kind, block in store.events if kind == "write"]
    assert len([n for n in ring.resident() if n.endswith(("_a", "_b"))]) == 5 * 4
    ring.restore()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("method", ["llm_int8", "group_int4"])
def test_packed_blocks_come_as_they_are(method: str) -> None:
    models = []
    for _ in range(2):
        model = decoder(LLAMA | DEEP | {"hidden_size": 64, "intermediate_size": 128})
        compressor = COMPRESSORS[method]()
        compressor.begin(model)
        for block in model.blocks:
            compressor.block(block, [])  # type: ignore[arg-type]
        compressor.finish(model)
        Lora(r=2).install(model, key)
        models.append(model)
    before = {name: buffer.clone() for name, buffer in models[0].named_buffers()}
    assert any("qweight" in name for name in before)
    ring = offload(models[0])
    rule = ZO2(lr=0.1, eps=1e-2)
    assert run(rule, models[0]) == run(ZoSGD(lr=0.1, eps=1e-2), models[1])
    products = [m for m in models[0].blocks.modules() if isinstance(m, Int8Linear)]
    assert len(products) == (4 * 5 if method == "llm_int8" else 0)
    assert all(product._product is None for product in products), "nothing made of a block outlives its visit"
    ring.restore()
    assert same(weights(models[0]), weights(models[1]))
    assert same(dict(models[0].named_buffers()), before), "no code was touched"


def test_a_step_of_which_nothing_is_found_still_decays_weights() -> None:
    ours, theirs = decoder(LLAMA), decoder(LLAMA)
    Full().install(ours, key)
    Full().install(theirs, key)
    rule, plain = ZO2(**SETTINGS), ZoSGD(**SETTINGS)
    rule.prepare(ours)
    plain.prepare(theirs)
    start = weights(theirs)
    for one, model in ((rule, ours), (plain, theirs)):
        one.apply(model, {"loss": 1.0, "g": [0.0]}, at(0))
    rule.finish(ours)
    assert same(weights(ours), weights(theirs))
    assert not same(weights(ours), start)


def test_any_order_of_visits_finds_blocks_up_to_date(tmp_path: Path) -> None:
    ours, theirs = decoder(OPT | {"num_hidden_layers": 6}), decoder(OPT | {"num_hidden_layers": 6})
    Full().install(ours, key)
    Full().install(theirs, key)
    ring = offload(ours, Watched(FileStore(tmp_path), seed=3), write_every=2)
    rule, plain = ZO2(**SETTINGS), ZoSGD(**SETTINGS)
    rule.prepare(ours)
    plain.prepare(theirs)
    order = random.Random(1)
    for step in range(12):
        scalars = {"loss": 1.0, "g": [0.5 + step]}
        rule.apply(ours, scalars, at(step % 4))
        plain.apply(theirs, scalars, at(step % 4))
        for index in order.choices(range(6), k=order.randrange(4)):
            with ring.visit(index) as found:
                assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in found.items())
    ring.restore()
    assert same(weights(ours), weights(theirs))


class Failing(Watched):
    fail: tuple[str, int] | None = None

    def read(self, block: int, into: Tensor) -> None:
        if self.fail == ("read", block):
            raise OSError(errno.EIO, "broken disk")
        super().read(block, into)

    def write(self, block: int, content: Tensor) -> None:
        if self.fail == ("write", block):
            raise OSError(errno.EIO, "broken disk")
        super().write(block, content)


def go_on(rule: ZoSGD, model: Decoder) -> None:
    for step in (2, 3):
        batch = source().batch(step)
        rule.apply(model, rule.measure(model, Language(), batch, Alone(2), at(step)), at(step))


@pytest.mark.parametrize("fail", [("read", 3), ("write", 2)])
def test_a_block_that_is_lost_ends_the_run_and_the_log_has_it(fail: tuple[str, int], tmp_path: Path) -> None:
    model, again = decoder(OPT | DEEP), decoder(OPT | DEEP)
    Full().install(model, key)
    Full().install(again, key)
    store = Failing(FileStore(tmp_path))
    offload(model, store, write_every=1)
    rule = ZO2(**SETTINGS)
    log = run(rule, model, steps=2)
    store.fail = fail
    with pytest.raises(RunFailed, match=f"block {fail[1]} could not be moved.*goes on from its log"):
        go_on(rule, model)
    with pytest.raises(RunFailed, match="a block was lost"):
        rule.measure(model, Language(), source().batch(2), Alone(2), at(2))
    fresh = ZO2(**SETTINGS)
    fresh.prepare(again)
    for step, scalars in enumerate(log):
        fresh.apply(again, scalars, at(step))
    expected = decoder(OPT | DEEP)
    Full().install(expected, key)
    assert run(ZoSGD(**SETTINGS), expected, steps=2) == log
    fresh.finish(again)
    assert same(weights(again), weights(expected))


def test_choices_of_several_rows_go_through_it_too() -> None:
    from axicon.data.tokenised import Example, Row, collate

    rows = [
        Example(tuple(Row((3 + i, 7 * i + j, j + 1), (False, True, True)) for j in range(2)), i % 2)
        for i in range(4)
    ]
    batch = collate(rows)
    ours, theirs = decoder(LLAMA), decoder(LLAMA)
    Full().install(ours, key)
    Full().install(theirs, key)
    found = []
    for rule, model in ((ZO2(**SETTINGS), ours), (ZoSGD(**SETTINGS), theirs)):
        rule.prepare(model)
        found.append(rule.measure(model, Choice(over="choices"), batch, Alone(2), at(0)))
    assert found[0] == found[1]


class Twice:
    def loss(self, model: Any, batch: Batch) -> Tensor:
        return Language().loss(model, batch) + Language().loss(model, batch)


class Never:
    def loss(self, model: Any, batch: Batch) -> Tensor:
        return torch.zeros(len(batch))


def test_what_cannot_be_offloaded_is_refused(tmp_path: Path) -> None:
    model = decoder(LLAMA)
    Full().install(model, key)
    rule = ZO2(**SETTINGS)
    rule.prepare(model)
    with pytest.raises(AxiconError, match="Twice goes through the model more than once"):
        rule.measure(model, Twice(), source().batch(0), Alone(), at(0))
    with pytest.raises(AxiconError, match="Never sends nothing"):
        rule.measure(model, Never(), source().batch(0), Alone(), at(0))
    with pytest.raises(ValueError, match="take zo_sgd"):
        ZO2(blocks=True)
    with pytest.raises(AxiconError, match="has no blocks"):
        ZO2().prepare(torch.nn.Linear(2, 2))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(AxiconError, match="no file for blocks can be made there"):
        FileStore(blocked)


def test_more_blocks_at_once_than_buffers() -> None:
    model = decoder(LLAMA | DEEP)
    ring: Offload = offload(model, buffers=2)
    with ring.visit(0), ring.visit(0), ring.visit(1):
        assert model.blocks[0].qkv.weight.numel() > 0
    assert model.blocks[0].qkv.weight.numel() == 0
    with pytest.raises(ValueError, match="more blocks at once than 2 buffers"), ring.visit(0), ring.visit(1):
        ring._buffer_of(2)
    ring.close()


def test_the_largest_opt_fits_a_small_gpu() -> None:
    shape = ModelShape.from_config(
        {
            "model_type": "opt", "vocab_size": 50272, "hidden_size": 12288, "word_embed_proj_dim": 12288,
            "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96,
            "max_position_embeddings": 2048,
        }
    )  # fmt: skip
    found = predict(shape, batch=1, tokens=2048)
    assert found.weights == pytest.approx(2 * 174.6e9, rel=1e-3), "12 h^2 a layer, and the embeddings"
    assert found.buffers == pytest.approx(3 * 2 * 12 * 12288**2, rel=1e-3)
    assert found.resident == pytest.approx(2 * 12288 * (50272 + 2050 + 2), rel=1e-6)
    assert 12e9 < found.total < 18e9
    twice = predict(shape, batch=2, tokens=2048)
    assert twice.streams == 2 * found.streams
    assert predict(shape, batch=1, tokens=2048, itemsize=4).share == found.share


def test_what_is_predicted_is_what_lies_there(tmp_path: Path) -> None:
    model = decoder(OPT | {"num_hidden_layers": 8})
    Full().install(model, key)
    expected = predict(model.shape, batch=1, tokens=8, itemsize=4)
    ring = offload(model, FileStore(tmp_path))
    assert ring.ring_bytes == pytest.approx(expected.buffers, rel=0.05), "but for the gaps between tensors"
    assert sum(p.numel() * 4 for p in ring.resident().values()) == expected.resident
    ring.close()
