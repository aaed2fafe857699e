"""The weight map: where each tensor of a checkpoint lives in a Decoder.

A family is two tables of names. Which biases, norms and projections exist is read off the decoder itself, and
so are the buffers of packed products, which keep the decoder's own names.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axicon.model.decoder import Decoder
from axicon.model.formats import Packing, global_name, install
from axicon.model.masks import MASK, have_masks, make_room
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of one parameter or buffer of a Decoder (all of it where `rows` is None)."""

    parameter: str
    rows: slice | None = None
    dtype: torch.dtype | None = None
    """What a packed format prescribes; None for dense tensors: stored as some float, cast to the model's."""
    heads: int | None = None
    """The file has q, k and v of the first head, then those of the next one (GPT-NeoX), for so many heads."""


MODEL_NAMES = {
    "llama": {
        "embed_tokens": "model.embed_tokens", "project_in": "model.project_in", "final_norm": "model.norm",
        "lm_head": "lm_head",
    },
    "opt": {
        "embed_tokens": "model.decoder.embed_tokens", "embed_positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out",
        "final_norm": "model.decoder.final_layer_norm", "lm_head": "lm_head",
    },
    "gpt_neox": {
        "embed_tokens": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
}
LAYERS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
BLOCK_NAMES = {
    "llama": {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    },
    "opt": {
        "attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "up": "fc1", "down": "fc2",
    },
    "gpt_neox": {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "qkv": "attention.query_key_value", "out": "attention.dense",
        "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    },
}
OWN_NAMES = {
    "attention_shortcut": "attention_shortcut", "mlp_shortcut": "mlp_shortcut", "head_gate": "head_gate",
}
"""In the blocks of every family: axicon's own, no other program has them."""
PREFIX = "model."
"""What the bare base model's checkpoint leaves out (facebook/opt-125m does)."""


def weight_map(decoder: Decoder) -> dict[str, Place]:
    """Name in the checkpoint -> place, for every parameter, mask and packed buffer of this decoder (a stage
    names only its own).
    """
    shape = decoder.shape
    places: dict[str, Place] = {}
    masks = [name for name, _ in decoder.named_buffers() if name.endswith(f".{MASK}")]
    for parameter in [*(name for name, _ in decoder.named_parameters()), *masks]:
        module, _, kind = parameter.rpartition(".")
        dtype = torch.uint8 if kind == MASK else None
        if module.startswith("blocks."):
            _, local, name = module.split(".")
            index = decoder.first + int(local)
            layer = f"{LAYERS[shape.family]}.{index}"
            names = BLOCK_NAMES[shape.family] | OWN_NAMES
            if name in names:
                heads = shape.blocks[index].heads if name == "qkv" else None
                places[f"{layer}.{names[name]}.{kind}"] = Place(parameter, dtype=dtype, heads=heads)
                continue
            for part, rows in shape.blocks[index].parts(name).items():
                places[f"{layer}.{names[part]}.{kind}"] = Place(parameter, rows, dtype)
        else:
            # A tied head without the embedding beside it (a last stage) is read from the embedding.
            tied = module == "lm_head" and kind == "weight" and shape.tie_head
            name = MODEL_NAMES[shape.family]["embed_tokens" if tied else module]
            places[f"{name}.{kind}"] = Place(parameter)
    for path, module_ in decoder.named_modules():
        if isinstance(module_, PackedLinear):
            for buffer, value in module_.named_buffers():
                dtype = None if buffer == "bias" else value.dtype
                places[f"{global_name(decoder, path)}.{buffer}"] = Place(f"{path}.{buffer}", dtype=dtype)
    return places


def tensor_at(decoder: Decoder, place: Place) -> Tensor:
    """The tensor of a place, or the view of its rows; a copy where the file has them in another order."""
    module, _, name = place.parameter.rpartition(".")
    value: Tensor = getattr(decoder.get_submodule(module), name)
    if place.heads is not None:
        return value.unflatten(0, (3, place.heads, -1)).transpose(0, 1).flatten(0, 2)
    return value if place.rows is None else value[place.rows]


def as_placed(place: Place, stored: Tensor) -> Tensor:
    """A tensor of the file in the order of the decoder's rows."""
    if place.heads is None:
        return stored
    return stored.unflatten(0, (place.heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def stored_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Everything this decoder holds, by its name in the checkpoint; wide dtypes first, so that each tensor
    lies in the file at a multiple of its item size.
    """
    tensors = {name: tensor_at(decoder, place) for name, place in weight_map(decoder).items()}
    yield from sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def whole_map(
    shape: ModelShape, packing: Mapping[str, Packing] | None = None, names: Container[str] = ()
) -> dict[str, Place]:
    """The weight map of the whole model, without memory for it. `names` are those of the stored tensors, for
    masks among them.
    """
    with torch.device("meta"):
        decoder = Decoder(shape)
        install(decoder, packing or {})
        install_masks(decoder, names)
    return weight_map(decoder)


def install_masks(decoder: Decoder, names: Container[str]) -> None:
    """Room for the masks of those products of this decoder that have some among the stored tensors."""
    for path, module in decoder.named_modules():
        name = global_name(decoder, path)
        if not (isinstance(module, nn.Linear) and name.startswith("blocks.")):
            continue
        if have_masks(product_names(decoder.shape, name)[0], names):
            make_room(module)


def ignorable(name: str, shape: ModelShape) -> bool:
    """Names that old checkpoints carry and that hold nothing the model needs."""
    tied = shape.tie_head and name == head_name(shape)
    masks = (".attention.bias", ".attention.masked_bias") if shape.family == "gpt_neox" else ()
    return tied or name.endswith(("rotary_emb.inv_freq", *masks))


def product_names(shape: ModelShape, module: str) -> tuple[list[str], int | None]:
    """Names in a checkpoint of the products that one product of the decoder is made of, in the order of its
    rows; and `Place.heads`, for one whose rows are in another order there.
    """
    if not module.startswith("blocks."):
        return [MODEL_NAMES[shape.family][module]], None
    _, index, name = module.split(".")
    names, block = BLOCK_NAMES[shape.family] | OWN_NAMES, shape.blocks[int(index)]
    layer = f"{LAYERS[shape.family]}.{index}"
    if name in names:
        return [f"{layer}.{names[name]}"], block.heads if name == "qkv" else None
    return [f"{layer}.{names[part]}" for part in block.parts(name)], None


def head_name(shape: ModelShape) -> str:
    """Name of the head's weight in a checkpoint of the family."""
    return f"{MODEL_NAMES[shape.family]['lm_head']}.weight"


def set_tensor(decoder: nn.Module, path: str, value: Tensor) -> None:
    """Replace a buffer, or a parameter wherever it is shared."""
    module, _, kind = path.rpartition(".")
    owner = decoder.get_submodule(module)
    if kind in owner._buffers:
        owner._buffers[kind] = value
        return
    old = decoder.get_parameter(path)
    parameter = nn.Parameter(value, requires_grad=False)
    for other in [owner, *decoder.modules()]:
        if other._parameters.get(kind) is old:
            other._parameters[kind] = parameter
