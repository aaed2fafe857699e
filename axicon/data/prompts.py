"""Prompts: a record becomes a text that ends where the answer begins, and the answer is a word or a text.

Templates are Jinja, in a sandbox; fields of the record are its variables. Zeroth-order training works on
tasks put as the model has seen text (arXiv:2402.11592, section 4.3), so what is scored is the answer alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axicon.data.table import Placed
from axicon.data.tokenised import Example, Row, Tokenised, Tokenizer
from axicon.errors import AxiconError

_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a record is put to the model. Either `verbalizer` or `options` says what may follow."""

    template: str
    """The text before the answer. A blank between the two belongs to the answer."""
    verbalizer: Mapping[str, str] | None = None
    """Label -> word. Two labels may share one."""
    options: tuple[str, ...] = ()
    """Templates of the texts that may follow; the label counts them from 0."""
    label: str = "label"
    """The field with the label."""
    shorten: str | None = None
    """The field that is cut on the left where a prompt is too long; none: the first of the template."""

    def __post_init__(self) -> None:
        if (self.verbalizer is None) == (not self.options):
            raise AxiconError("a prompt has a verbalizer (label: word) or options (texts), one of them")
        if len(set((self.verbalizer or {}).values())) < 2 and len(self.options) < 2:
            raise AxiconError("a prompt has at least two answers to choose from")
        for text in (self.template, *self.options):
            try:
                _JINJA.parse(text)
            except jinja2.TemplateError as error:
                raise AxiconError(f"template {text!r}: {error}") from None
        if self.shorten is not None and self.shorten not in self.fields:
            raise AxiconError(
                f"shorten={self.shorten}: the template has no such field, it has {', '.join(self.fields)}"
            )

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Fields that the texts use, in the order in which they come first."""
        text = "\n".join((self.template, *self.options))
        names = jinja2.meta.find_undeclared_variables(_JINJA.parse(text))
        return tuple(sorted(names, key=text.find))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The different words of the verbalizer, in its order."""
        return tuple(dict.fromkeys((self.verbalizer or {}).values()))

    @cached_property
    def templates(self) -> tuple[jinja2.Template, ...]:
        return tuple(_JINJA.from_string(text) for text in (self.template, *self.options))

    def render(self, placed: Placed, over: Mapping[str, str] | None = None) -> tuple[str, tuple[str, ...]]:
        """The prompt and what may follow it. `over` replaces fields."""
        values = {name: placed.record.get(name) for name in self.fields} | dict(over or {})
        try:
            prompt, *options = (template.render(values) for template in self.templates)
        except Exception as error:  # a template calls methods of strings, which raise what they like
            placed.refuse(f"the template does not fit this record ({error})")
        if not prompt.strip():
            placed.refuse("the prompt made of it is empty")
        return prompt, self.words or tuple(options)

    def check(self, placed: Placed) -> None:
        """Raise AxiconError for a record that lacks a field, or has an empty one."""
        for name in self.fields:
            if name not in placed.record or placed.record[name] is None:
                placed.refuse(f"no field {name!r}; it has {', '.join(placed.record)}")
            value = placed.record[name]
            if isinstance(value, str) and not value.strip():
                placed.refuse(f"{name!r} is empty; take the record out")

    def answer(self, placed: Placed) -> int:
        """The index of what follows. Raises AxiconError for a label that is none."""
        if placed.record.get(self.label) is None:
            placed.refuse(f"no label in field {self.label!r}; it has {', '.join(placed.record)}")
        name = label_name(placed.record[self.label])
        if self.verbalizer is not None:
            if name not in self.verbalizer:
                placed.refuse(
                    f"label {name} is not in the verbalizer, which has {', '.join(self.verbalizer)}"
                )
            return self.words.index(self.verbalizer[name])
        if name not in map(str, range(len(self.options))):
            placed.refuse(f"label {name}: there are {len(self.options)} options, counted from 0")
        return int(name)


def label_name(label: Any) -> str:
    """A label as a verbalizer names it: text as it is, everything else as in JSON (`0`, `true`)."""
    return label if isinstance(label, str) else json.dumps(label, default=str)


def tokenise(
    prompt: Prompt,
    rows: Sequence[Placed],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    batch: int = 16,
    seed: int = 0,
) -> Tokenised:
    """Records as examples of at most `max_tokens` tokens.

    A prompt that is too long loses the beginning of its `shorten` field, never anything else. Raises
    AxiconError, with the place of the record, for one without a label, with an empty field, or that stays
    too long; and for words that begin with the same token.
    """
    encode = _Encoder(tokenizer)
    choices: tuple[int, ...] | None = None
    examples, shortened = [], 0
    for placed in rows:
        prompt.check(placed)
        answer = prompt.answer(placed)
        text, _ = prompt.render(placed)
        if prompt.words and choices is None:
            choices = _first_tokens(encode, placed, text, prompt.words)
        made, cut = _fitted(prompt, placed, answer if prompt.words else None, encode, max_tokens)
        shortened += cut
        if choices is not None:
            made = [_label_token(placed, row, choices[answer]) for row in made]
        examples.append(Example(tuple(made), answer))
    return Tokenised(examples, batch, seed, choices, shortened)


class _Encoder:
    """Token ids of texts, with the special tokens that this tokenizer puts before any."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        return ids

    def starts(self, text: str) -> list[int]:
        """Where each token of a text begins in it."""
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in made["offset_mapping"]]

    def row(self, placed: Placed, prompt: str, following: str) -> Row:
        """The two as one text, what follows scored. The boundary must be one between tokens."""
        before, whole = self(prompt), self(prompt + following)
        if whole[: len(before)] != before or len(whole) == len(before):
            placed.refuse(
                f"the answer {following!r} is not a token of its own behind {prompt[-12:]!r}: end the "
                "template without a blank and begin the answer with one"
            )
        return Row(tuple(whole), tuple(i >= len(before) > 0 for i in range(len(whole))))


def _first_tokens(encode: _Encoder, placed: Placed, text: str, words: Sequence[str]) -> tuple[int, ...]:
    first = []
    for word in words:
        row = encode.row(placed, text, word)
        first.append(row.tokens[row.scored.index(True)])
    for i, token in enumerate(first):
        twin = first.index(token)
        if twin != i:
            raise AxiconError(
                f"verbalizer: {words[twin]!r} and {words[i]!r} begin with the same token of this tokenizer, "
                "and answers are told apart by their first: choose words that begin otherwise"
            )
    return tuple(first)


def _label_token(placed: Placed, row: Row, token: int) -> Row:
    """Up to the first token of the answer, which alone is scored."""
    place = row.scored.index(True)
    if row.tokens[place] != token:
        placed.refuse("its answer begins with another token here than elsewhere: change the template's end")
    return Row(row.tokens[: place + 1], row.scored[: place + 1])


def _fitted(
    prompt: Prompt, placed: Placed, chosen: int | None, encode: _Encoder, max_tokens: int
) -> tuple[list[Row], bool]:
    """A row for what follows, or one for all that may (`chosen` None), and whether a field was cut."""
    name = prompt.shorten or prompt.fields[0]
    value = placed.record.get(name)
    over: dict[str, str] = {}
    while True:
        text, followings = prompt.render(placed, over)
        wanted = followings if chosen is None else (followings[chosen],)
        rows = [encode.row(placed, text, one) for one in wanted]
        excess = max(len(row.tokens) for row in rows) - max_tokens
        if excess <= 0:
            return rows, bool(over)
        starts = encode.starts(value) if isinstance(value, str) else []
        if not isinstance(value, str) or excess >= len(starts):
            placed.refuse(
                f"{max_tokens + excess} tokens, at most {max_tokens} fit, and {name!r} alone is too short to "
                "be cut by so much: raise max_tokens, or take the record out"
            )
        # The tokens left may join otherwise than before, so this can take another turn.
        value = value[starts[excess] :].lstrip()
        over = {name: value}
