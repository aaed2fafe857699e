"""Writes a model directory as one GGUF file, which llama.cpp and the programs around it read.

The file as in github.com/ggml-org/ggml, docs/gguf.md, through the `gguf` package. GGML's types have blocks of
32 columns with a float16 scale each; wider groups and whole rows repeat theirs:

    Q4_0    group codes of 2 to 4 bits without zeros, exactly
    Q4_1    those with zeros: minus scale times zero is stored as a float16, which is not always exact
    Q8_0    group codes of 5 to 8 bits, exactly, and int8 products, whose scales become float16

Products of other formats, and those whose groups 32 does not divide, are dequantised and rounded to Q8_0.
What is dense stays as it is, norms and biases as float32. A packed copy of a tied head is left out: the
embedding is the head there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import read_manifest
from axicon.model.decoder import Decoder, inverse_frequencies
from axicon.model.foreign.export import row_counts
from axicon.model.gguf_tokenizer import tokenizer_fields
from axicon.model.group_int import GroupIntLinear
from axicon.model.int8 import Int8Linear
from axicon.model.interchange import BLOCK_TENSORS, MODEL_TENSORS, ROPE_FACTORS
from axicon.model.masks import MASK
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape, Rope
from axicon.model.weights import product_names, stored_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of a config, and what GGUF calls it."""
BLOCK = 32
Q4_0, Q4_1, Q8_0, F32, BF16 = 2, 3, 8, 0, 30
"""Numbers of GGML's types."""
_OURS = {ours: theirs for theirs, ours in (BLOCK_TENSORS | MODEL_TENSORS).items()}


def write_gguf(source: Path, path: Path) -> list[str]:
    """Write the model of a directory to a file. Returns what a user should know of it, in words.

    Raises AxiconError for a model that GGUF has no names for, and OSError.
    """
    from gguf import GGUFWriter

    shape = checkpoint.shape_of(source)
    if shape.architecture not in ARCHITECTURES or any(block.window for block in shape.blocks):
        raise AxiconError(
            f"{source}: {shape.architecture} cannot be written as GGUF here; known are "
            f"{', '.join(ARCHITECTURES)}, without sliding windows")
    if shape.only_here:
        raise AxiconError(f"{source}: the model {shape.only_here}, which GGUF cannot say")
    notes: dict[str, None] = {}
    writer = GGUFWriter(path, ARCHITECTURES[shape.architecture])
    _write_fields(writer, source, shape)
    # Twice over the blocks: the header comes first and wants all sizes, and one block is in memory at a time.
    for name, kind, rows in _tensors(source, shape, notes):
        array = rows.numpy()
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=_type(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, rows in _tensors(source, shape, notes):
        writer.write_tensor_data(rows.numpy())
    writer.close()
    return list(notes)


def _type(kind: int) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind)


def _write_fields(writer: GGUFWriter, source: Path, shape: ModelShape) -> None:
    block, manifest = shape.blocks[0], read_manifest(source) or {}
    writer.add_name(str(manifest.get("name") or source.name))
    if manifest.get("licence"):
        writer.add_license(str(manifest["licence"]))
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(block.hidden)
    writer.add_head_count(block.heads)
    writer.add_head_count_kv(block.kv_heads)
    writer.add_key_length(block.head_width)
    writer.add_value_length(block.head_width)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    rope = shape.rope
    assert rope is not None  # of every architecture here
    writer.add_rope_dimension_count(block.head_width)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    for name, value in tokenizer_fields(source, shape.vocab).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)


def _tensors(
    source: Path, shape: ModelShape, notes: dict[str, None]
) -> Iterator[tuple[str, int, Tensor]]:
    """Name, type and rows as they lie in the file: bytes (O, ...), or float32."""
    seen: set[str] = set()
    if shape.rope is not None and shape.rope.kind == "llama3":
        width = shape.blocks[0].head_width
        plain = inverse_frequencies(Rope(theta=shape.rope.theta), width)
        yield ROPE_FACTORS, F32, plain / inverse_frequencies(shape.rope, width)
    for i in range(shape.layers):
        part = checkpoint.load(source, dtype=None, blocks=range(i, i + 1))
        for name, kind, rows in _of_part(part, shape, notes):
            if name in seen:
                continue
            seen.add(name)
            module, _, suffix = name.rpartition(".")
            local = module.split(".", 3)[3] if module.startswith("model.layers.") else module
            if local not in _OURS or suffix not in ("weight", "bias"):
                raise AxiconError(f"{source}: GGUF has no name for {name}")
            theirs = _OURS[local]
            heads = {"attn_q": shape.blocks[i].heads, "attn_k": shape.blocks[i].kv_heads}.get(theirs)
            if heads is not None and ARCHITECTURES[shape.architecture] == "llama":
                rows = pairs_together(rows, heads)
            where = f"blk.{module.split('.')[2]}.{theirs}" if local != module else theirs
            yield f"{where}.{suffix}", kind, rows.contiguous()


def pairs_together(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of query and key rows; `halves_together` of interchange.py undoes it."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _of_part(part: Decoder, shape: ModelShape, notes: dict[str, None]) -> Iterator[tuple[str, int, Tensor]]:
    """The same with names of a checkpoint."""
    packed = {
        (path if not path.startswith("blocks.") else f"blocks.{part.first}.{path.split('.', 2)[-1]}"): module
        for path, module in part.named_modules() if isinstance(module, PackedLinear)
    }  # fmt: skip
    own = tuple(f"{module}." for module in packed)
    if shape.tie_head and packed.pop("lm_head", None) is not None:
        notes["the head is the embedding itself; its packed copy is left out"] = None
    for module, linear in packed.items():
        names, _ = product_names(shape, module)
        kind, rows = as_ggml(linear, notes)
        sizes = row_counts(shape, module, linear.outputs)
        for name, piece in zip(names, rows.split(sizes), strict=True):
            yield f"{name}.weight", kind, piece
        if linear.bias is not None:
            for name, bias in zip(names, linear.bias.float().split(sizes), strict=True):
                yield f"{name}.bias", F32, bias
    for name, tensor in stored_tensors(part):
        if name.startswith(own) or name.endswith(f".{MASK}"):
            continue
        yield (name, F32, tensor.float()) if tensor.ndim == 1 else (name, *_dense(tensor))


def _dense(weight_OI: Tensor) -> tuple[int, Tensor]:
    if weight_OI.dtype == torch.bfloat16:
        return BF16, weight_OI.contiguous().view(torch.uint8)
    return F32, weight_OI.float()


def as_ggml(linear: PackedLinear, notes: dict[str, None]) -> tuple[int, Tensor]:
    """Type and rows, bytes (O, ...), of a product."""
    if linear.inputs % BLOCK:
        notes["products with inputs that 32 does not divide are dense"] = None
        return _dense(linear.unpack().bfloat16())
    if isinstance(linear, Int8Linear):
        notes["scales of int8 products are rounded to float16, their activations are not rounded"] = None
        scale_OB = (linear.absmax / 127.0)[:, None].expand(-1, linear.inputs // BLOCK)
        return Q8_0, _q8(linear.qweight, scale_OB)
    if isinstance(linear, GroupIntLinear) and linear.order is None and _fits(linear):
        return _of_group(linear, notes)
    notes[f"products stored as {linear.format} that no type of GGML fits are rounded again, to Q8_0"] = None
    weight_OI = linear.unpack().float()
    scale_OB = (weight_OI.unflatten(1, (-1, BLOCK)).abs().amax(2) / 127).half().float()
    steps = weight_OI.unflatten(1, (-1, BLOCK)) / torch.where(scale_OB > 0, scale_OB, torch.inf)[..., None]
    return Q8_0, _q8(steps.round().clamp(-127, 127).flatten(1).to(torch.int8), scale_OB)


def _fits(linear: GroupIntLinear) -> bool:
    return (linear.group or linear.inputs) % BLOCK == 0 and (linear.bits < 8 or linear.zero is None)


def _of_group(linear: GroupIntLinear, notes: dict[str, None]) -> tuple[int, Tensor]:
    codes_OI, middle = linear.codes().to(torch.int16), 1 << (linear.bits - 1)
    repeats = (linear.group or linear.inputs) // BLOCK
    scale_OB = linear.scale.float().repeat_interleave(repeats, 1)
    if linear.scale_dtype != "float16":
        notes["scales are rounded to float16"] = None
    if linear.zero is None:
        if linear.bits <= 4:
            return Q4_0, _joined(_half(scale_OB), _nibbles(codes_OI + 8 - middle))
        return Q8_0, _q8((codes_OI - middle).to(torch.int8), scale_OB)
    zero_OB = linear.zero.to(torch.int16).repeat_interleave(repeats, 1)
    if linear.bits <= 4:
        notes["zeros of 4 bits or fewer become float16 offsets, less than a hundredth of a step off"] = None
        return Q4_1, _joined(_half(scale_OB), _half(-scale_OB * zero_OB), _nibbles(codes_OI))
    signed_OI = codes_OI - zero_OB.repeat_interleave(BLOCK, 1)
    return Q8_0, _q8(signed_OI.to(torch.int8), scale_OB)


def _q8(signed_OI: Tensor, scale_OB: Tensor) -> Tensor:
    return _joined(_half(scale_OB), signed_OI.unflatten(1, (-1, BLOCK)).view(torch.uint8))


def _nibbles(codes_OI: Tensor) -> Tensor:
    """(O, blocks, 16): the first half of a block in the low halves of the bytes, the second in the high."""
    low, high = codes_OI.to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return low | (high << 4)


def _half(value_OB: Tensor) -> Tensor:
    """(O, blocks, 2) bytes of float16."""
    return value_OB.to(torch.float16)[..., None].contiguous().view(torch.uint8)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 2).flatten(1)
