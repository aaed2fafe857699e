"""SliceGPT: rotation changes nothing, slicing loses the weakest components, and the size is as said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.compress import slice_gpt
from axicon.compress.calibration import Calibration
from axicon.compress.chain import Chain
from axicon.compress.directory import compress_blocks, write_calibrated
from axicon.compress.gptq import GPTQ
from axicon.compress.magnitude import Magnitude
from axicon.compress.slice_gpt import SliceGPT, parameters
from axicon.compress.walk import compress
from axicon.compress.wanda import Wanda
from axicon.compress.work import Work
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import write_json
from axicon.model.decoder import Decoder, Norm
from axicon.model.shape import ModelShape
from axicon.model.tensorwriter import write_weights
from axicon.model.weights import stored_tensors

SIZES = {"vocab_size": 96, "num_hidden_layers": 3, "hidden_size": 48, "max_position_embeddings": 64,
         "num_attention_heads": 4}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "intermediate_size": 80, "num_key_value_heads": 2,
                      "rms_norm_eps": 1e-6},
    "tied": SIZES | {"model_type": "llama", "intermediate_size": 80, "num_key_value_heads": 2,
                     "tie_word_embeddings": True},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 48},
    "opt without biases": SIZES | {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 48,
                                   "enable_bias": False, "tie_word_embeddings": False},
}  # fmt: skip
TOKENS = torch.randint(0, 96, (6, 40), generator=torch.Generator().manual_seed(1))
SAMPLE = Calibration(TOKENS)


def decoder(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random, with norms and biases that do something, and embeddings with a mean."""
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(CONFIGS[name])).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.embed_tokens.weight.add_(0.5)
    return model.to(dtype)


def made(**settings: Any) -> SliceGPT:
    return SliceGPT(**({"round_to": 1, "tie": "project", "max_size_ratio": 9.0} | settings))


def difference(got: Decoder, want: Decoder) -> float:
    a, b = got.logits(TOKENS), want.logits(TOKENS)
    return float((a - b).abs().max() / b.abs().max())


class TestRotation:
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("orientation", ["pca", "random"])
    @pytest.mark.parametrize("tie", ["project", "untie"])
    def test_alone_changes_nothing(self, name: str, orientation: str, tie: str) -> None:
        dense = decoder(name)
        turned = compress(made(fraction=0.0, orientation=orientation, tie=tie), copy.deepcopy(dense), SAMPLE)
        assert not torch.equal(turned.blocks[0].down.weight, dense.blocks[0].down.weight)
        # logits come as float32, whose last place this is
        assert difference(turned, dense) < 1e-5
        exact = compress(made(fraction=0.0, orientation=orientation, tie=tie),
                         decoder(name, torch.float64), SAMPLE)  # fmt: skip
        assert difference(exact, decoder(name, torch.float64)) < 1e-6

    def test_the_random_orientation_changes_nothing_at_any_width(self) -> None:
        plain = compress(made(fraction=0.3), decoder("opt"), SAMPLE)
        mixed = compress(made(fraction=0.3, orientation="random"), decoder("opt"), SAMPLE)
        assert not torch.allclose(mixed.blocks[1].qkv.weight, plain.blocks[1].qkv.weight, atol=1e-3)
        assert difference(mixed, plain) < 1e-4

    def test_components_are_orthogonal_and_leave_the_tail_of_the_spectrum(self) -> None:
        x = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
        gram = slice_gpt._Gram(24)
        gram.add(x)
        values = torch.linalg.eigvalsh(x.T @ x).flip(0)
        q = gram.components()
        assert (q.T @ q - torch.eye(24)).abs().max() < 1e-10
        for width in (6, 18):
            rest = x - x @ q[:, :width] @ q[:, :width].T
            assert torch.allclose(rest.square().sum(), values[width:].sum(), rtol=1e-9)

    def test_a_norm_over_fewer_channels_still_divides_by_all(self) -> None:
        x = torch.randn(5, 30)
        narrow = Norm("rms", 30, 1e-5, divisor=48)(x)
        wide = Norm("rms", 48, 1e-5)(torch.cat([x, torch.zeros(5, 18)], 1))
        torch.testing.assert_close(narrow, wide[:, :30])


class TestSlicing:
    @pytest.mark.parametrize("name", ["llama", "opt"])
    def test_a_stream_within_a_subspace_loses_nothing(self, name: str) -> None:
        """Embeddings and all that is written lie in 20 dimensions of 48."""
        dense = decoder(name, torch.float64)
        basis = torch.linalg.qr(torch.randn(48, 20, dtype=torch.float64)).Q
        inside = basis @ basis.T
        if name == "opt":  # of vectors without a mean, which is what layer norms look at
            centre = torch.eye(48, dtype=torch.float64) - 1 / 48
            basis = torch.linalg.qr(centre @ basis).Q
            inside = basis @ basis.T
        dense.embed_tokens.weight.copy_(dense.embed_tokens.weight @ inside)
        if name == "opt":
            dense.embed_positions.weight.copy_(dense.embed_positions.weight @ inside)
        for block in dense.blocks:
            for product in (block.out, block.down):
                product.weight.copy_(inside @ product.weight)
                if product.bias is not None:
                    product.bias.copy_(inside @ product.bias)
        small = compress(made(fraction=28 / 48), copy.deepcopy(dense), SAMPLE)
        assert small.blocks[1].down.weight.shape == (20, 80)
        assert difference(small, dense) < 1e-5

    def test_shapes(self) -> None:
        small = compress(made(fraction=0.25), decoder("llama"), SAMPLE)
        for block in small.blocks:
            last = block.index == 2
            assert block.qkv.weight.shape == (96, 36)
            assert block.out.weight.shape == (36, 48)
            assert block.gate_up.weight.shape == (160, 36)
            assert block.down.weight.shape == (48 if last else 36, 80)
            assert block.attention_shortcut.weight.shape == (36, 36)
            assert block.mlp_shortcut.weight.shape == (48 if last else 36, 36)
        assert small.embed_tokens.weight.shape == (96, 36)

    @pytest.mark.parametrize("name", ["llama", "opt"])
    def test_the_more_goes_the_worse_it_gets_and_components_beat_chance(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dense = decoder(name)
        errors = [
            difference(compress(made(fraction=share), copy.deepcopy(dense), SAMPLE), dense)
            for share in (0.0, 0.1, 0.3, 0.6)
        ]
        assert errors == sorted(errors)

        def chance(self: slice_gpt._Gram) -> Tensor:
            return torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64)).Q

        monkeypatch.setattr(slice_gpt._Gram, "components", chance)
        torch.manual_seed(3)
        assert difference(compress(made(fraction=0.1), copy.deepcopy(dense), SAMPLE), dense) > 1.5 * errors[1]


class TestSizes:
    @pytest.mark.parametrize(("name", "tie"), [("llama", "reject"), ("tied", "project"), ("tied", "untie"),
                                               ("opt", "project")])  # fmt: skip
    def test_the_predicted_size_is_the_real_one(self, name: str, tie: str) -> None:
        dense = decoder(name)
        method = made(fraction=0.25, tie=tie)
        want = parameters(method.reshaped(dense.shape))
        small = compress(method, dense, SAMPLE)
        assert sum(p.numel() for p in small.parameters()) == want
        assert sum(tensor.numel() for name, tensor in stored_tensors(small)) == want

    def test_the_table_of_the_paper_model(self) -> None:
        """SmolLM2-135M: shortcuts and an untied head cost more than a little slicing saves."""
        shape = ModelShape.from_config({
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": True})  # fmt: skip
        dense = parameters(shape)
        for fraction, untied, projected in (
            (0.11, 1.216, 1.033),
            (0.22, 1.078, 0.918),
            (1 / 3, 0.943, 0.806),
        ):
            for tie, want in (("untie", untied), ("project", projected)):
                got = made(fraction=fraction, tie=tie, round_to=8).reshaped(shape)
                assert parameters(got) / dense == pytest.approx(want, abs=0.003)
        with pytest.raises(AxiconError, match=r"has 1.03\d times the weights.*larger fraction"):
            SliceGPT(fraction=0.11, tie="project").reshaped(shape)


@pytest.mark.usefixtures("own_cache")
class TestDirectories:
    def write(self, name: str, folder: Path) -> Path:
        folder.mkdir()
        write_weights(folder, stored_tensors(decoder(name)))
        write_json(folder / "config.json", CONFIGS[name])
        return folder

    @pytest.mark.parametrize("name", ["tied", "opt"])
    @pytest.mark.parametrize("on_disk", [True, False])
    def test_one_that_went_on_is_the_same(self, name: str, on_disk: bool, tmp_path: Path) -> None:
        source, settings = self.write(name, tmp_path / "dense"), {"fraction": 0.3}

        class Stop(Exception): ...

        def stop(done: int, total: int, note: str) -> None:
            if done == 2:
                raise Stop

        for steps, folder in (([None], "whole"), ([stop, None], "again")):
            work = Work(tmp_path / f"{folder}.work", {})
            for progress in steps:
                work = Work(tmp_path / f"{folder}.work", {})
                arguments = {"progress": progress} if progress else {}
                try:
                    compress_blocks(made(**settings), source, work, SAMPLE, dtype=torch.float32,
                                    on_disk=on_disk, **arguments)  # fmt: skip
                except Stop:
                    assert work.done == 2
            (tmp_path / folder).mkdir()
            write_calibrated(source, tmp_path / folder, work, dtype=torch.float32)
        whole, again = (checkpoint.load(tmp_path / one, dtype=torch.float32) for one in ("whole", "again"))
        assert torch.equal(whole.logits(TOKENS), again.logits(TOKENS))
        want = compress(made(**settings), decoder(name), SAMPLE)
        assert whole.shape == want.shape
        torch.testing.assert_close(whole.logits(TOKENS), want.logits(TOKENS), rtol=1e-4, atol=1e-4)
        assert not list((tmp_path / "whole").glob("model*.safetensors"))

    @pytest.mark.parametrize(("slicing", "says"), [
        ({"version": 2, "width": 8, "projected": True}, "version 2, this axicon reads 1"),
        ({"version": 1, "width": 80, "projected": True}, "80 of 48 channels"),
        ({"version": 1, "width": "8", "projected": True}, "a width of '8'"),
        ({"width": 8}, "not what axicon writes"),
    ])  # fmt: skip
    def test_a_config_that_says_something_else_is_refused(self, slicing: Any, says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            ModelShape.from_config(CONFIGS["llama"] | {"slicing": slicing})


class TestTogether:
    def test_slice_prune_and_round_as_one(self) -> None:
        steps = (made(fraction=0.25, round_to=4), Wanda(pattern="2:4"), GPTQ(group=-1))
        model = compress(Chain(("slice_gpt", "wanda", "gptq"), steps), decoder("opt"), SAMPLE)
        weight = model.blocks[1].attention_shortcut.unpack()
        assert weight.shape == (36, 36)
        assert ((weight.view(-1, 4) == 0).sum(1) >= 2).all()
        assert difference(model, decoder("opt")) < 1

    def test_a_trial_on_one_block_takes_the_chain_too(self) -> None:
        steps = (made(fraction=0.25, round_to=4), Wanda(pattern="2:4"), GPTQ(group=-1))
        block = decoder("opt").blocks[1]
        Chain(("slice_gpt", "wanda", "gptq"), steps).block(block, [torch.randn(1, 20, 48)])
        assert block.down.unpack().shape == (36, 80)

    def test_behind_pruning_it_is_refused(self) -> None:
        with pytest.raises(AxiconError, match="slice_gpt behind magnitude would fill what was pruned"):
            Chain(("magnitude", "slice_gpt"), (Magnitude(), made()))
        with pytest.raises(AxiconError, match=r"blocks.0.qkv is packed or pruned"):
            compress(made(), compress(Magnitude(), decoder("llama")), SAMPLE)


class TestRefused:
    @pytest.mark.parametrize(("name", "config", "settings", "says"), [
        ("tied", {}, {"tie": "reject"}, "choose tie=project"),
        ("opt", {"do_layer_norm_before": False}, {}, "norms behind the residual sum"),
        ("llama", {}, {"fraction": 0.9, "round_to": 8}, "leaves less than round_to=8"),
        ("llama", {"slicing": {"version": 1, "width": 8, "projected": False}}, {}, "is sliced already"),
    ])  # fmt: skip
    def test_models(self, name: str, config: Any, settings: Any, says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            made(**settings).reshaped(ModelShape.from_config(CONFIGS[name] | config))

    @pytest.mark.parametrize("settings", [{"fraction": 1.0}, {"fraction": -0.1}, {"round_to": 0}])
    def test_settings(self, settings: Any) -> None:
        with pytest.raises(AxiconError, match="slice_gpt: "):
            SliceGPT(**settings)

    def test_states_of_dense_blocks(self) -> None:
        with pytest.raises(AxiconError, match=r"inputs=dense.*take sequential"):
            compress(made(), decoder("llama"), Calibration(TOKENS, dense=True))
