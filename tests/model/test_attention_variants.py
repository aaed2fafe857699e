"""Clipped softmax and gated heads: what the paper says of them, with and without a cache, kept and read."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.compress.calibration import Calibration
from axicon.compress.directory import write_compressed
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.slice_gpt import SliceGPT
from axicon.compress.smooth_quant import SmoothQuant
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.finetune.checkpoint import TensorCheckpoints
from axicon.finetune.log import Log
from axicon.finetune.loop import Run, loss_of, train
from axicon.finetune.objectives import OBJECTIVES
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.generate.paged import PagedRunner
from axicon.generate.runner import LocalRunner
from axicon.model import checkpoint
from axicon.model.adapters import SCHEMES, Gated
from axicon.model.attention import HeadGate, attend, causal_mask, clip, dense_attention, reference_attention
from axicon.model.decoder import Block, Decoder
from axicon.model.foreign.export import compressed_tensors
from axicon.model.native import why_not
from axicon.model.shape import ModelShape
from axicon.model.tensorwriter import write_weights
from axicon.model.variant import (
    PLAIN,
    AttentionVariant,
    as_config,
    clipped,
    with_variants,
)  # fmt: skip
from axicon.model.weights import stored_tensors
from axicon.protocols import Moment
from axicon.step import RowPolicy, StepInput
from tests.contracts import combinations
from tests.contracts.test_combinations import request, texts
from tests.finetune.small import LLAMA, source
from tests.finetune.small import decoder as small

SIZES: dict[str, Any] = {
    "vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 64,
    "num_attention_heads": 4,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 2},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
}
VARIANTS = {
    "clipped": AttentionVariant(gamma=-0.06, zeta=1.03),
    "linear": AttentionVariant(gate="linear"),
    "mlp": AttentionVariant(gate="mlp", gate_hidden=4),
    "all_heads": AttentionVariant(gate="all_heads"),
    "both": AttentionVariant(gamma=-0.06, gate="linear", gate_scale=2.0),
}
TEXT = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(9)).tolist()
CHUNKS = (16, 11, *(1,) * 13)


def shape_of(family: str, variant: AttentionVariant) -> ModelShape:
    config = CONFIGS[family]
    return with_variants(ModelShape.from_config(config), [variant] * config["num_hidden_layers"])


def decoder(
    family: str = "llama", variant: AttentionVariant = PLAIN, first: AttentionVariant = PLAIN
) -> Decoder:
    """Logits of attention are large enough for a clip to bite. `first` is that of the first block alone."""
    shape = shape_of(family, variant)
    if first is not PLAIN:
        shape = with_variants(shape, [first, variant])
    torch.manual_seed(0)
    model = Decoder(shape).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
        elif name.endswith("head_gate.bias"):
            parameter.normal_(0, 1)
    return model


def block_of(model: Decoder) -> Any:
    return model.blocks[0]


def stored(model: Decoder, folder: Path, family: str = "llama") -> Path:
    """As a directory."""
    folder.mkdir()
    config = CONFIGS[family] | {"attention_variant": as_config(model.shape)}
    (folder / "config.json").write_text(json.dumps(config))
    written: dict[str, Tensor] = dict(stored_tensors(model))
    if model.shape.tie_head:
        written.pop("lm_head.weight", None)
    write_weights(folder, written.items())
    return folder


class TestClip:
    def test_without_a_clip_it_is_softmax(self) -> None:
        shares = torch.randn(5, 9).softmax(-1)
        assert clip(shares, PLAIN) is shares
        by_hand = ((1.0 - 0.0) * shares + 0.0).clamp(0, 1)
        assert torch.equal(by_hand, shares)

    def test_the_ends_are_exact_and_have_no_gradient(self) -> None:
        variant = AttentionVariant(gamma=-0.05, zeta=1.02)
        logits = 4 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        shares = logits.softmax(-1).requires_grad_(True)
        out = clip(shares, variant)
        out.sum().backward()
        low, high = 0.05 / 1.07, 1.05 / 1.07
        assert shares.grad is not None
        for where, value, slope in (
            (shares < low, 0.0, 0.0), (shares > high, 1.0, 0.0),
            ((shares > low) & (shares < high), None, 1.07),
        ):  # fmt: skip
            assert where.any()
            assert torch.allclose(shares.grad[where], torch.tensor(slope))
            assert value is None or (out[where] == value).all()
        assert 0 <= out.detach().min() <= out.detach().max() <= 1

    @pytest.mark.parametrize("tokens", [8, 64])
    def test_equal_shares(self, tokens: int) -> None:
        """1/T stretched by -alpha/T is 1/T^2 for alpha 1, and nothing at all for alpha 2."""
        equal = torch.full((1, tokens), 1 / tokens)
        assert torch.allclose(clip(equal, clipped(1.0, tokens)), torch.tensor(1 / tokens**2), atol=1e-8)
        assert (clip(equal, clipped(2.0, tokens)) == 0).all()

    @pytest.mark.parametrize("window", [None, 7])
    @pytest.mark.parametrize("length", [20, 300])
    def test_dense_attention_equals_the_reference(self, window: int | None, length: int) -> None:
        """More queries than are computed at once, too."""
        torch.manual_seed(0)
        q, k, v = torch.randn(2, length, 4, 8), torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8)
        got = dense_attention(q, k, v, 0.7, window, variant=VARIANTS["clipped"])
        mask = causal_mask(length, window)
        for b in range(2):
            want = reference_attention(q[b], k[b], v[b], mask, 0.7, VARIANTS["clipped"])
            torch.testing.assert_close(got[b], want)
        assert not torch.allclose(got, dense_attention(q, k, v, 0.7, window))

    def test_the_reference_by_hand(self) -> None:
        q, k = torch.tensor([[[1.0]]]), torch.tensor([[[0.0]], [[2.0]]])
        v = torch.tensor([[[3.0]], [[5.0]]])
        share = torch.tensor([0.0, 2.0]).softmax(0)
        want = float((1.1 * share[0] - 0.1).clamp(0, 1) * 3 + (1.1 * share[1] - 0.1).clamp(0, 1) * 5)
        sees = torch.ones(1, 2, dtype=torch.bool)
        got = reference_attention(q, k, v, sees, 1.0, AttentionVariant(gamma=-0.1))
        assert float(got) == pytest.approx(want)

    def test_rows_that_are_nothing_stay_so(self) -> None:
        """A wide clip takes all of an even row; nothing divides by its sum."""
        q = torch.zeros(1, 2, 12, 4)
        out = attend(q, q, torch.ones(1, 2, 12, 4), scale=1.0, variant=clipped(6.0, 12))
        assert (out == 0).all()


class TestGates:
    @pytest.mark.parametrize(("gate", "formula"), [
        ("linear", lambda h, d, n: h * (d + 1)), ("mlp", lambda h, d, n: h * (n * (d + 2) + 1)),
        ("all_heads", lambda h, d, n: h * (h * d + 1)),
    ])  # fmt: skip
    def test_parameters(self, gate: Any, formula: Any) -> None:
        found = HeadGate(AttentionVariant(gate=gate, gate_hidden=5), 24, 3)
        assert sum(p.numel() for p in found.parameters()) == formula(3, 8, 5)

    @pytest.mark.parametrize("gate", ["linear", "mlp"])
    def test_a_head_reads_its_own_channels(self, gate: Any) -> None:
        torch.manual_seed(0)
        one = HeadGate(AttentionVariant(gate=gate), 24, 3)
        x = torch.randn(5, 24)
        other = x.clone()
        other[:, 8:16] += 1
        changed = (one(x) != one(other)).any(0).tolist()
        assert changed == [False, True, False]

    def test_all_heads_read_everything(self) -> None:
        torch.manual_seed(0)
        one = HeadGate(AttentionVariant(gate="all_heads"), 24, 3)
        x = torch.randn(5, 24)
        torch.testing.assert_close(one(x), torch.sigmoid(x @ one.weight.T + one.bias))

    def test_the_mlp_by_hand(self) -> None:
        torch.manual_seed(0)
        one: Any = HeadGate(AttentionVariant(gate="mlp", gate_hidden=4, gate_scale=1.5), 24, 3)
        x = torch.randn(5, 24)
        for head in range(3):
            inside = (x[:, 8 * head : 8 * head + 8] @ one.up_weight[head].T + one.up_bias[head]).relu()
            want = 1.5 * torch.sigmoid(inside @ one.weight[head] + one.bias[head])
            torch.testing.assert_close(one(x)[:, head], want)

    @pytest.mark.parametrize("family", CONFIGS)
    @pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
    def test_a_bias_alone_scales_attention(self, family: str, gate: Any) -> None:
        x, seen = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), []
        for variant, b in ((PLAIN, None), (AttentionVariant(gate=gate), -0.7)):
            model = decoder(family, variant)
            block = block_of(model)
            plain = decoder(family).state_dict()
            model.load_state_dict(plain, strict=False)
            if b is not None:
                for p in block.head_gate.parameters():
                    p.zero_()
                block.head_gate.bias.fill_(b)
            block.out.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
            block.attention(x, model.rotary(torch.arange(6)), lambda _b, q, k, v: q)
        torch.testing.assert_close(seen[1], torch.sigmoid(torch.tensor(-0.7)) * seen[0], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
    def test_gates_that_join_a_trained_model_leave_it_as_it_was(self, gate: Any) -> None:
        """Half open and doubled, with hardly any weight."""
        plain = decoder()
        model = decoder(variant=AttentionVariant(gate=gate, gate_scale=2.0))
        model.load_state_dict(plain.state_dict(), strict=False)
        for block in model.blocks:
            assert isinstance(block, Block)
            assert block.head_gate is not None
            block.head_gate.start(0.5, spread=0.0)
        tokens = torch.tensor([TEXT])
        torch.testing.assert_close(model.logits(tokens), plain.logits(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_future_is_unseen_and_a_cache_changes_nothing(family: str, name: str) -> None:
    model = decoder(family, VARIANTS[name])
    whole = model.logits(torch.tensor([TEXT]))[0]
    assert not torch.allclose(whole, decoder(family).logits(torch.tensor([TEXT]))[0], atol=1e-3)
    torch.testing.assert_close(model.logits(torch.tensor([TEXT[:11]]))[0], whole[:11], atol=1e-4, rtol=0)
    runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    torch.testing.assert_close(through_the_cache(runner), whole, atol=1e-4, rtol=0)


def through_the_cache(runner: LocalRunner) -> Tensor:
    """Logits of all tokens of the text."""
    out, start = [], 0
    commits: tuple[int, ...] = ()
    for size in CHUNKS:
        reserves = () if start else ((0, 64),)
        step = nodes(range(start, start + size), forced=size > 1, commits=commits, reserves=reserves)
        out.append(runner.forward(step).logits_WV)
        start, commits = start + size, tuple(range(size))
    return torch.cat(out)


def nodes(positions: range, forced: bool, **lists: Any) -> StepInput:
    count = len(positions)
    row, yes = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
    tokens = torch.tensor([TEXT[i] for i in positions])
    return StepInput(
        tokens, torch.tensor(positions), row, torch.arange(-1, count - 1), yes, row, yes & forced, **lists
    )


def test_what_an_eviction_counts_is_what_was_clipped() -> None:
    """H2O keeps the slots that attention gave most; shares that the clip took are none."""
    model = decoder(variant=clipped(8.0, 40))
    runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=4, prefill_chunk=64)
    policy = RowPolicy(0, 0, 20, 4, 0, 0, 0)
    step = nodes(range(40), True, reserves=((0, 64),), policies=(policy,), layered=((0, 2),))
    runner.forward(step)
    tally = runner.cache.rows[0].tally
    assert tally is not None
    plain = LocalRunner(decoder(), kv_bytes=8 << 20, max_rows=4, prefill_chunk=64)
    plain.forward(step)
    unclipped = plain.cache.rows[0].tally
    assert unclipped is not None
    assert float(tally.sums_LGC[0].sum()) < 0.8 * float(unclipped.sums_LGC[0].sum())


class TestStorage:
    @pytest.mark.parametrize("family", CONFIGS)
    @pytest.mark.parametrize("name", VARIANTS)
    def test_what_is_written_is_read(self, family: str, name: str, tmp_path: Path) -> None:
        model = decoder(family, VARIANTS[name])
        found = checkpoint.load(stored(model, tmp_path / "m", family), dtype=torch.float32)
        assert found.shape == model.shape
        assert torch.equal(found.logits(torch.tensor([TEXT])), model.logits(torch.tensor([TEXT])))

    def test_blocks_may_differ(self, tmp_path: Path) -> None:
        model = decoder(variant=VARIANTS["clipped"], first=VARIANTS["mlp"])
        found = as_config(model.shape)
        assert isinstance(found, list)
        read = checkpoint.load(stored(model, tmp_path / "m"), dtype=torch.float32)
        assert torch.equal(read.logits(torch.tensor([TEXT])), model.logits(torch.tensor([TEXT])))
        stage = checkpoint.load(tmp_path / "m", dtype=torch.float32, blocks=range(1, 2))
        assert block_of(stage).variant == VARIANTS["clipped"]

    def test_a_plain_model_says_nothing(self) -> None:
        assert as_config(shape_of("llama", PLAIN)) is None
        read = ModelShape.from_config(CONFIGS["llama"] | {"attention_variant": {"gamma": 0, "gate": "none"}})
        assert read == ModelShape.from_config(CONFIGS["llama"])

    @pytest.mark.parametrize(("found", "says"), [
        ("clipped", "is not an object of gamma, zeta, gate"), ({"gama": -0.1}, "is not an object of gamma"),
        ({"gamma": 0.1}, "from above -1 to 0"), ({"zeta": 0.5}, "at least 1"),
        ({"gamma": "-1"}, "gamma is '-1'"),
        ({"gate": "conditional"}, "known are none, linear, mlp, all_heads"), ({"gate": True}, "gate is True"),
        ({"gate_hidden": 0}, "from 1 to"), ({"gate_hidden": 2.5}, "gate_hidden is 2.5"),
        ({"gate_scale": 0}, "more than 0"), ([{"gate": "linear"}], "1 variants for 2 blocks"),
        ({"gamma": float("nan")}, "from above -1 to 0"),
    ])  # fmt: skip
    def test_a_config_that_says_something_else_is_refused(self, found: Any, says: str) -> None:
        with pytest.raises(AxiconError, match=r"config\.json: attention_variant: ") as raised:
            ModelShape.from_config(CONFIGS["llama"] | {"attention_variant": found})
        assert says in str(raised.value)

    def test_heads_that_are_not_the_width_need_one_gate_for_all(self) -> None:
        wide = CONFIGS["llama"] | {"head_dim": 8}
        with pytest.raises(AxiconError, match="are not its 64; take gate=all_heads"):
            ModelShape.from_config(wide | {"attention_variant": {"gate": "linear"}})
        assert Decoder(ModelShape.from_config(wide | {"attention_variant": {"gate": "all_heads"}}))


class TestWithOthers:
    @pytest.mark.parametrize("name", ["clipped", "linear"])
    def test_the_kernels_do_not_run_it_and_say_so(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        model = decoder(variant=VARIANTS[name]).bfloat16()
        reason = why_not(model)
        assert reason == f"its attention has {VARIANTS[name]}"
        with caplog.at_level(logging.WARNING, "axicon"):
            runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=4, kernels="auto")
        assert runner.native is None
        assert f"steps run in torch, slower than the C++ kernels, because {reason}" in caplog.text
        with pytest.raises(AxiconError, match="the C\\+\\+ kernels cannot run this model: its attention has"):
            LocalRunner(model, kv_bytes=8 << 20, max_rows=4, kernels="native")

    def test_pages_of_a_gpu_take_gates_and_refuse_a_clip(self) -> None:
        with pytest.raises(AxiconError, match=r"a clipped softmax has no attention on a GPU.*device=cpu"):
            PagedRunner(decoder(variant=VARIANTS["both"]), kv_bytes=8 << 20, max_rows=4, graphs=False)

    def test_eviction_and_drafting_keep_the_text(self) -> None:
        """As docs/combinations.md says of formats, for a model with both."""
        torch.manual_seed(0)
        variant = AttentionVariant(gamma=-0.01, gate="linear")
        target = Decoder(with_variants(ModelShape.from_config(combinations.CONFIG), [variant] * 2))
        for parameter in target.requires_grad_(False).parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        engine = combinations.engine_of(target.eval(), combinations.decoder(noise=0.004))
        found = {}
        for policy in ("full", "h2o"):
            for way in ("none", "lookup", "rsd_s"):
                one = request(policy, way, 0)
                found[policy, way] = texts(engine, [one])[0][one.id]
        for policy in ("full", "h2o"):
            assert found[policy, "lookup"] == found[policy, "rsd_s"] == found[policy, "none"]
        assert found["full", "none"] != found["h2o", "none"]

    def test_slicing_refuses_gates_and_takes_a_clip(self) -> None:
        sample = Calibration(torch.tensor([TEXT, TEXT[::-1]]))
        rotation = SliceGPT(fraction=0.0, round_to=1, tie="project", max_size_ratio=9.0)
        with pytest.raises(AxiconError, match="has gates on its heads, which read the stream that would be"):
            compress(rotation, decoder(variant=VARIANTS["linear"]), sample)
        model, tokens = decoder(variant=VARIANTS["clipped"]), torch.tensor([TEXT])
        want = model.logits(tokens)
        torch.testing.assert_close(compress(rotation, model, sample).logits(tokens), want, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
    def test_gates_read_what_a_norm_gave_before_it_was_scaled(self, gate: Any) -> None:
        model = decoder(variant=AttentionVariant(gate=gate))
        block_of(model).attention_norm.weight[5] = 30.0  # an outlier, so that scales are far from 1
        opened = []
        block_of(model).head_gate.register_forward_hook(lambda _m, _given, out: opened.append(out))
        tokens = torch.tensor([TEXT])
        model.logits(tokens)
        before = block_of(model).attention_norm.weight.clone()
        compress(SmoothQuant(), model, Calibration(tokens))
        opened[1:] = []
        model.logits(tokens)
        assert not torch.allclose(block_of(model).attention_norm.weight, before, rtol=0.1)
        torch.testing.assert_close(opened[1], opened[0], atol=1e-4, rtol=1e-4)

    def test_gates_stay_dense_and_no_other_program_is_fooled(self, tmp_path: Path) -> None:
        source = stored(decoder(variant=VARIANTS["both"]), tmp_path / "m")
        (tmp_path / "small").mkdir()
        write_compressed(LLMInt8(head=False), source, tmp_path / "small", dtype=torch.bfloat16)
        model = checkpoint.load(tmp_path / "small")
        assert block_of(model).head_gate.weight.dtype == torch.bfloat16
        assert block_of(model).variant == VARIANTS["both"]
        assert not (tmp_path / "small" / "model.safetensors").exists()
        (tmp_path / "theirs").mkdir()
        with pytest.raises(AxiconError, match=r"has softmax clipped to .* and linear gates.*cannot say"):
            compressed_tensors(tmp_path / "small", tmp_path / "theirs")


class TestTraining:
    @pytest.mark.parametrize("name", UPDATE_RULES)
    def test_every_update_rule_moves_gates_and_what_is_behind_a_clip(self, name: str, tmp_path: Path) -> None:
        both = {"gamma": -0.02, "gate": "linear"}
        model = small(LLAMA | {"attention_variant": both})
        SCHEMES["full"]().install(model, Moment(0, 7).key)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        losses = steps(name, model, tmp_path)
        assert all(math.isfinite(loss) for loss in losses)
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
        assert {"blocks.1.qkv.weight", "blocks.1.out.weight", "blocks.1.head_gate.weight"} <= moved
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
    def test_gates_join_a_trained_model_and_train(self, gate: Any, tmp_path: Path) -> None:
        exact, model, again = small(LLAMA), small(LLAMA), small(LLAMA)
        tokens = torch.arange(30)[None]
        want, scheme = exact.logits(tokens), Gated(gate=gate)
        Gated(gate=gate, spread=0.0).install(exact, Moment(0, 7).key)
        torch.testing.assert_close(exact.logits(tokens), want, atol=1e-5, rtol=0)
        for one in (model, again):
            scheme.install(one, Moment(0, 7).key)
        moved = (model.logits(tokens) - want).norm() / want.norm()
        assert 0 < moved.detach() < 0.02
        assert torch.equal(model.logits(tokens), again.logits(tokens)), "gates are drawn from the run's key"
        before = block_of(model).head_gate.weight.detach().clone()
        steps("adamw", model, tmp_path)
        assert not torch.equal(block_of(model).head_gate.weight, before)
        scheme.merge(model)
        config = LLAMA | {"attention_variant": as_config(model.shape)}
        assert ModelShape.from_config(config).blocks == model.shape.blocks
        with pytest.raises(AxiconError, match="have gates already"):
            scheme.install(model, Moment(0, 7).key)


def steps(name: str, model: Decoder, folder: Path) -> list[float]:
    """Losses of two steps of an update rule."""
    rule: Any = UPDATE_RULES[name](**({"first_order": 1} if name == "hybrid" else {}))  # type: ignore[call-arg]
    with Log(folder / "log.jsonl", {"rule": name}) as log:
        train(Run(
            model=model, rule=rule, objective=OBJECTIVES["language"](), source=source(), mean=Alone(1),
            log=log, steps=2, seed=7, checkpoints=TensorCheckpoints(folder, 2),
        ))  # fmt: skip
        return [loss for one in log.steps if (loss := loss_of(one)) is not None]
