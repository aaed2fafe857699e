"""The tokenizer on the HTTP side: tokens as bytes, whatever kind of tokenizer; chats as text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from services.errors import ApiError
from services.render import label, line
from services.text import LONG, Text, byte_alphabet
from tests.services.fake_engine import byte_tokenizer


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(byte_tokenizer())


@pytest.fixture(scope="module")
def fallback() -> Text:
    """As LLaMA's first tokenizers: a mark for blanks, and single bytes for what is not in the vocabulary."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Text(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))


def test_the_byte_alphabet_is_the_one_of_byte_level_tokenizers() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert (byte_alphabet()["A"], byte_alphabet()["Ġ"], byte_alphabet()["Ċ"]) == (65, 32, 10)


@pytest.mark.parametrize("sample", ["naïve", "🦊 and 你好", " two  blanks\n\t"])
def test_the_bytes_of_tokens_spell_the_text(text: Text, sample: str) -> None:
    ids = text.encode(sample, special=False)
    assert b"".join(map(text.piece, ids)).decode() == sample
    assert text.decode(ids) == sample


def test_special_tokens_stand_for_their_name(text: Text) -> None:
    ids = text.encode("a<|end|>", special=False)
    assert [text.piece(token) for token in ids] == [b"a", b"<|end|>"]
    assert text.decode(ids) == "a<|end|>"
    assert text.decode(ids, special=False) == "a"


def test_ids_without_a_token_stand_for_nothing(text: Text) -> None:
    assert text.piece(text.size + 5) == b""


def test_byte_fallback_tokens_are_single_bytes(fallback: Text) -> None:
    ids = fallback.encode("a 🦊", special=False)
    assert b"".join(map(fallback.piece, ids)) == " a 🦊".encode()
    assert fallback.piece(ids[-1]) == "🦊".encode()[-1:]


async def test_long_texts_give_the_same_beside_the_loop(text: Text) -> None:
    sample = "añ" * LONG
    assert await text.encode_beside(sample, special=False) == text.encode(sample, special=False)
    chat = [{"role": "user", "content": sample}]
    assert await text.render_beside(chat) == text.render(chat)


def test_the_longest_token_bounds_what_a_text_can_shrink_to(text: Text) -> None:
    assert text.longest == len("<|assistant|>")


def test_a_missing_template_is_the_clients_to_know() -> None:
    with pytest.raises(ApiError, match="/v1/completions"):
        Text(byte_tokenizer(template=None)).render([{"role": "user", "content": "a"}])


def test_a_token_is_written_as_text_or_as_bytes() -> None:
    assert label("é".encode()) == "é"
    assert label(b"\xc3") == "bytes:\\xc3"
    assert label(b"a\xff") == "bytes:\\x61\\xff"


@pytest.mark.parametrize("breaking", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x0b", "\x1c"])
def test_events_are_one_line_to_every_reader(breaking: str) -> None:
    assert len(line(f"a{breaking}b").splitlines()) == 1
