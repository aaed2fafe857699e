"""The tokenizer as the HTTP side needs it: text to ids before the engine, ids to text in answers.

Works on a copy of the Rust tokenizer. Encoding and decoding there need no lock and release the interpreter,
so long prompts are encoded in a worker thread while the engine thread decodes with its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
from tokenizers import Tokenizer

from services.errors import bad_request

LONG = 4096
"""Characters from which on work on a text is moved off the event loop."""


class Text:
    """Encoding, decoding and the chat template of one model."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast tokenizer of `transformers`."""
        self._chat = tokenizer
        self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        self._added = {i: token.content for i, token in self._fast.get_added_tokens_decoder().items()}
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self._fast.to_str())["decoder"])
        self.size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self.piece = lru_cache(maxsize=65536)(self._piece)
        """Token id to the bytes it stands for; unknown ids stand for none."""
        self.longest = max(len(self._piece(token)) for token in range(self.size))
        """Bytes of the longest token."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; `special` adds what the model expects around it, such as a first token."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        return ids

    async def encode_beside(self, text: str, *, special: bool) -> list[int]:
        """`encode`, in a worker thread when it takes long enough to hold up the event loop."""
        if len(text) > LONG:
            return await asyncio.to_thread(self.encode, text, special=special)
        return self.encode(text, special=special)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of ids; `special` says whether special tokens are part of it."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=not special)
        return text

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat as the model was trained to read it, up to where the assistant speaks."""
        if not self._chat.chat_template:
            raise bad_request(
                "This model has no chat template: use /v1/completions with a prompt instead.",
                code="no_chat_template",
            )
        try:
            text: str = self._chat.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise bad_request(
                f"The model's chat template refuses these messages: {error}", "messages"
            ) from None
        return text

    async def render_beside(self, messages: Sequence[dict[str, str]]) -> str:
        """`render`, in a worker thread when it takes long enough to hold up the event loop."""
        if sum(len(message["content"]) for message in messages) > LONG:
            return await asyncio.to_thread(self.render, messages)
        return self.render(messages)

    def info(self) -> dict[str, Any]:
        """What a client needs to mirror the tokenizer."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(self._chat).__name__,
            **{name: getattr(self._chat, name, None) for name in names},
            "vocab_size": self.size,
            "chat_template": self._chat.chat_template,
        }

    def _piece(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._fast.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            table = byte_alphabet()
            return bytes(table[char] for char in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level tokenizers use for the 256 bytes: bytes with a printable
    Latin-1 character stand for themselves, the others are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
