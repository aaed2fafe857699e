"""The tokenizer inside a GGUF file, written as `tokenizer.json` and `tokenizer_config.json`.

GGUF names the splitting of text into words only by a label (`tokenizer.ggml.pre`); the splittings below are
those of the models' own tokenizer.json files. A label that is not known is refused, because a wrong
splitting gives wrong tokens silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.errors import AxiconError
from axicon.model import safety
from axicon.model.artefact import write_bytes, write_json
from axicon.model.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITTINGS = {
    # label: (regex or None for GPT-2's own, digits one by one first, whole words looked up before merging)
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "qwen2": (_WORDS.replace("{1,%d}", ""), False, False),
    "llama-bpe": (_WORDS % 3, False, True),
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
"""Token types: special tokens, and tokens added by the user that are matched whole but shown."""


def write_tokenizer(file: GGUFFile, folder: Path, *, positions: int) -> None:
    """Raises AxiconError for a tokenizer that cannot be carried over exactly."""
    fields = file.fields
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file)
    elif model == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise AxiconError(f"{file.path}: tokenizer model {model!r} is not built in; known are gpt2 and llama")
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    for role, field in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = fields.get(f"tokenizer.ggml.{field}_token_id")
        if token is None:
            continue
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise AxiconError(
                f"{file.path}: tokenizer.ggml.{field}_token_id is {token!r} of {len(tokens)} tokens")
        config[f"{role}_token"] = tokens[token]
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        safety.check_chat_template(template, str(file.path))
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _byte_level(file: GGUFFile) -> Tokenizer:
    """Byte-pair encoding over bytes, as GPT-2 introduced it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    fields = file.fields
    label = fields.get("tokenizer.ggml.pre", "missing")
    if label not in SPLITTINGS:
        raise AxiconError(
            f"{file.path}: tokenizer.ggml.pre {label!r} is not built in; known are {', '.join(SPLITTINGS)}. "
            "Take the model as safetensors, with its own tokenizer.json")
    whole_words = SPLITTINGS[label][2]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise AxiconError(f"{file.path}: the tokenizer's tokens repeat, or their types do not match them")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    except Exception as e:  # tokenizers raises a bare Exception for a merge of unknown tokens
        raise AxiconError(f"{file.path}: the tokenizer contradicts itself ({e})") from e
    tokenizer.pre_tokenizer = _splitting(label)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    first = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") and isinstance(first, int) and first < len(tokens):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", pair=f"{tokens[first]} $A {tokens[first]} $B",
            special_tokens=[(tokens[first], first)])
    return tokenizer


def _splitting(label: str) -> Any:
    """Of text into words."""
    from tokenizers import Regex, pre_tokenizers

    regex, digits, _ = SPLITTINGS[label]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if regex is not None:
        steps.append(pre_tokenizers.Split(Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    return pre_tokenizers.Sequence(steps)


def tokenizer_fields(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The way back: GGUF's fields for the tokenizer of a directory and a model of so many ids.

    Raises AxiconError for a tokenizer that GGUF has no name for here.
    """
    from axicon.model.checkpoint import load_tokenizer

    content = safety.read_json(folder / "tokenizer.json")
    model = content.get("model") or {}
    label = next((one for one in SPLITTINGS if _like(one, content)), None)
    normal = (content.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or label is None or normal not in (None, "NFC"):
        raise AxiconError(
            f"{folder / 'tokenizer.json'}: a tokenizer that cannot be written into a GGUF file here; known "
            f"are byte-level ones that split text as {', '.join(SPLITTINGS)} do")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [_UNUSED] * vocabulary
    for token, number in model["vocab"].items():
        if number < vocabulary:
            tokens[number], kinds[number] = token, _NORMAL
    for added in content.get("added_tokens", ()):
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added["special"] else _USER
    tokenizer: Any = load_tokenizer(folder)
    fields: dict[str, Any] = {
        "model": "gpt2", "pre": label, "tokens": tokens, "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }  # fmt: skip
    for role, field in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None and number < vocabulary:  # transformers adds some that the model has no row for
            fields[f"{field}_token_id"] = number
    fields["add_bos_token"] = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | template


def _like(label: str, content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits text as the label says."""
    named = json.loads(_splitting(label).__getstate__())
    whole_words = bool((content.get("model") or {}).get("ignore_merges"))
    return whole_words == SPLITTINGS[label][2] and _steps(content.get("pre_tokenizer")) == _steps(named)


def _steps(splitting: dict[str, Any] | None) -> list[Any]:
    """What of a splitting decides tokens."""
    found = splitting or {}
    steps = found.get("pretokenizers", [found])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    """LLaMA's own kind, through transformers' reader of it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except Exception as e:  # the library raises many kinds
        raise AxiconError(f"{file.path}: the tokenizer cannot be read ({type(e).__name__}: {e})") from e
    found: Tokenizer = tokenizer.backend_tokenizer
    return found
