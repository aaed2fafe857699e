"""What users put together: formats, cache policies, ways to guess. The table that the test runs and that
docs/combinations.md shows: `python -m tests.contracts.combinations` writes it, as `make combinations` does.

Every method in a table of the product is here by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration
from axicon.compress.walk import compress
from axicon.generate.draftmodel import DraftModel
from axicon.generate.engine import Engine
from axicon.generate.refused import METHODS, POLICIES, Refused, refused
from axicon.generate.request import Limits
from axicon.generate.runner import LocalRunner
from axicon.generate.speculate import Speculator
from axicon.generate.validate import check_request
from axicon.kernels import native
from axicon.model.decoder import Decoder
from axicon.model.formats import packing_of
from axicon.model.shape import ModelShape
from tests.contracts.methods import made

PAGE = Path(__file__).resolve().parents[2] / "docs" / "combinations.md"
FORMATS = ("dense", *COMPRESSORS)
WAYS = ("none", *METHODS)
VOCAB = 160
CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(3)))
LIMITS = Limits(kv_floor=8)


class Letters:
    """One character per token, none special."""

    all_special_ids = ()

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(64 + i) for i in ids)


def decoder(noise: float = 0.0) -> Decoder:
    """Large weights, so that greedy text does not repeat itself."""
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
            parameter += noise * torch.randn_like(parameter)
    # In torch, trees take another kernel than single rows: in bfloat16 near ties would fall differently.
    return model.to(torch.bfloat16 if native.why_unavailable() is None else torch.float64)


def in_format(name: str) -> Decoder:
    if name == "dense":
        return decoder()
    return compress(made(name), decoder(), SAMPLE)


def engine_of(target: Decoder, draft: Decoder | None = None) -> Engine:
    """As it is served: in the C++ kernels where they can."""

    def runner(model: Decoder) -> LocalRunner:
        return LocalRunner(model, kv_bytes=32 << 20, max_rows=128, prefill_chunk=32, kernels="auto")

    speculator = Speculator(None if draft is None else DraftModel(runner(draft)), always=draft is not None)
    tokenizer: Any = Letters()
    return Engine(runner(target), tokenizer, eos_ids=[1], limits=LIMITS, speculator=speculator)


@cache
def refusals() -> dict[str, list[Refused]]:
    """By what the deployment lacks."""
    engine, bare = engine_of(decoder(), decoder()), engine_of(decoder())
    longest, vocab = engine.max_model_len, engine.runner.capacity.vocab

    def in_stages(request: Any) -> None:
        check_request(request, vocab, longest, LIMITS, blocks=0)

    everywhere = refused(engine.check, longest, LIMITS)
    fields = [one.fields for one in everywhere]

    def only(found: list[Refused]) -> list[Refused]:
        return [one for one in found if one.fields not in fields]

    return {
        "Always": everywhere,
        "Without `draft=`": only(refused(bare.check, longest, LIMITS)),
        "With a model in stages": only(refused(in_stages, longest, LIMITS)),
    }


def works(policy: str, way: str) -> bool:
    wanted = {"kv": {"policy": policy}, "speculation": {"method": way}}
    return not any(one.fields.items() <= wanted.items() for one in refusals()["Always"])


def page() -> str:
    """docs/combinations.md."""
    lines = [
        "# What goes together",
        "",
        "Written by `make combinations` from the table that `tests/contracts/test_combinations.py` runs; not "
        "edited.",
        "",
        f"A cell names the ways to guess ahead that go with a format and a cache policy, *all* being "
        f"{_list(WAYS)}. Each is run at temperature 0 and sampled with a seed, alone and in one batch with "
        "all others of its row, and its text is the text of the same format and policy alone without "
        "guesses, token for token. Afterwards both caches are empty.",
        "",
        "| `compressor` | products | " + " | ".join(f"`{policy}`" for policy in POLICIES) + " |",
        "|---|---|" + "---|" * len(POLICIES),
    ]
    for name in FORMATS:
        stored = ", ".join(sorted({one.format for one in packing_of(in_format(name)).values()})) or "bfloat16"
        title = "none" if name == "dense" else name
        lines.append(f"| `{title}` | {stored} | " + " | ".join(_cell(policy) for policy in POLICIES) + " |")
    lines += ["", "## What is refused", "", "With 400, and the sentence beside it."]
    for title, found in refusals().items():
        lines += ["", f"{title}:", "", "| request | sentence |", "|---|---|"]
        lines += [f"| {_fields(one)} | {one.sentence} |" for one in found]
    return "\n".join(lines) + "\n"


def _cell(policy: str) -> str:
    ways = [way for way in WAYS if works(policy, way)]
    return "all" if len(ways) == len(WAYS) else _list(ways) or "nothing"


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _fields(one: Refused) -> str:
    said = []
    for name, value in one.fields.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        said += [f"`{name}{'.' * bool(key)}{key}={_word(of)}`" for key, of in inner]
    return " ".join(said)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
