"""Incremental text: whole characters, exact joins, stop strings split over tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from axicon.generate.detokenize import UNFINISHED, Detokenizer, StopText


def byte_level() -> PreTrainedTokenizerFast:
    """256 byte tokens, a few merges and a special token: characters outside ASCII are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("ð", "Ł")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece style: words with a leading mark, bytes for the rest; the first space is dropped."""
    words = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁hello", "▁world", "s", "▁a"]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(i) for i in ids]
    return [*pieces, detokenizer.finish()], detokenizer


TEXTS = [
    "hello world, hello  again\n",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪!",
    "日本語のテキスト、漢字とかな。",
    "ä̈ x\u0301 combining, Ελληνικά, עברית, العربية",
    "hello " * 30 + "🦜" * 20,
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(text)
    pieces, detokenizer = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any(UNFINISHED in piece for piece in pieces)
    assert pieces[-1] == ""
    assert detokenizer.length == len(text)
    assert sum(piece != "" for piece in pieces) > len(text) / 3


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_join_to_their_decoding(name, data):
    """Random ids are mostly broken UTF-8, which is where windows go wrong."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    if name == "byte fallback":
        # One bad byte makes its decoder replace the good bytes before it as well, after they were sent.
        ids = tokenizer.encode(decode(tokenizer, ids).replace(UNFINISHED, "é"))
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)


def test_broken_bytes_do_not_hold_text_back_for_ever():
    tokenizer = TOKENIZERS["byte level"]
    broken = tokenizer.convert_tokens_to_ids("Ģ")
    detokenizer = Detokenizer(tokenizer)
    handed = [detokenizer.add(broken) for _ in range(100)]
    assert len("".join(handed)) >= 95
    assert "".join(handed) + detokenizer.finish() == decode(tokenizer, [broken] * 100)


def test_first_space_is_dropped_once():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁hello", "▁world", "s", "▁a", "▁", "▁a"])
    pieces, _ = pieces_of(tokenizer, ids)
    assert pieces == ["", "hello", " world", "s", " a", " ", " a", ""]


def test_special_tokens_have_no_text():
    tokenizer = TOKENIZERS["byte level"]
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert "".join(pieces_of(tokenizer, ids)[0]) == "ab"


@pytest.mark.parametrize(
    ("stops", "parts", "sent", "stop"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", ""], "END"),
        (["END"], ["one E", "N", "E"], ["one ", "", "EN"], None),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], "\n\n"),
        (["abab"], ["aba", "abab"], ["", "aba"], "abab"),
        (["b", "abc"], ["xab", "c"], ["xa"], "b"),
        (["bc", "abcd"], ["xab", "c"], ["x", "a"], "bc"),
        (["bc", "abcd"], ["xabcd"], ["xa"], "bc"),
        (["日本"], ["これは日", "本です"], ["これは", ""], "日本"),
        ([], ["a", "b"], ["a", "b"], None),
    ],
)
def test_stop_strings(stops, parts, sent, stop):
    stopper = StopText(stops)
    got, met = [], None
    for part in parts:
        text, met = stopper.add(part)
        got.append(text)
        if met:
            break
    assert (got, met) == (sent, stop)
    if stop is None:
        assert "".join(got) + stopper.finish() == "".join(parts)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_however_text_is_split_the_result_is_the_same(text, stops, seed):
    places = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    cut = min(places)[1] if places else None
    random_ = random.Random(seed)
    stopper, got, met, rest = StopText(stops), "", None, text
    while rest and met is None:
        size = random_.randint(1, 3)
        piece, met = stopper.add(rest[:size])
        got += piece
        rest = rest[size:]
    assert (met is None) == (cut is None)
    if met is None:
        got += stopper.finish()
    assert got == text[:cut]
