"""Chats to train on, in the tokenizer's own template: what the assistant says is scored, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from axicon.data.table import Placed
from axicon.data.tokenised import Example, Row, Tokenised, Tokenizer
from axicon.errors import AxiconError

Message = dict[str, Any]
Span = tuple[int, int]
"""First character and the one behind the last."""


class ChatTokenizer(Tokenizer, Protocol):
    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def chats(
    rows: Sequence[Placed],
    tokenizer: ChatTokenizer,
    *,
    column: str = "messages",
    max_tokens: int,
    batch: int = 16,
    seed: int = 0,
) -> Tokenised:
    """Records whose field `column` is a list of messages, each with `role` and `content`.

    The mark that ends an assistant's message is scored with it. A chat that is too long loses its beginning.
    Raises AxiconError, with the place of the record, for one that is no chat, in which the assistant says
    nothing, or of whose assistant nothing is left.
    """
    if not tokenizer.chat_template:
        raise AxiconError("this model's tokenizer has no chat template: give prompts or plain text instead")
    examples, shortened = [], 0
    for placed in rows:
        text, spans = _rendered(placed, _messages(placed, column), tokenizer)
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [_is_inside(span, spans) for span in made["offset_mapping"]]
        shortened += len(inside) > max_tokens
        tokens, scored = made["input_ids"][-max_tokens:], [False, *inside[-max_tokens:][1:]]
        if not any(scored):
            placed.refuse("the assistant says nothing in it, or nothing within max_tokens")
        examples.append(Example((Row(tuple(tokens), tuple(scored)),)))
    return Tokenised(examples, batch, seed, None, shortened)


def _messages(placed: Placed, column: str) -> list[Message]:
    found = placed.record.get(column)
    if not isinstance(found, list) or not found:
        placed.refuse(f"no messages in field {column!r}; it has {', '.join(placed.record)}")
    for number, message in enumerate(found, start=1):
        if not (
            isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        ):
            placed.refuse(f"message {number} is no mapping with `role` and `content` as text")
    return found


def _rendered(placed: Placed, messages: list[Message], tokenizer: ChatTokenizer) -> tuple[str, list[Span]]:
    """The whole chat as text, and where the assistant speaks in it."""

    def text_of(some: list[Message], **options: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(some, tokenize=False, **options)
        except Exception as error:  # templates raise what they like, among it for roles that do not alternate
            placed.refuse(f"the chat template refuses it ({error})")
        return text

    whole = text_of(messages)
    return whole, list(_spans(placed, messages, whole, text_of))


def _spans(placed: Placed, messages: list[Message], whole: str, text_of: Any) -> Iterator[Span]:
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text_of(messages[:i], add_generation_prompt=True) if i else ""
        after = text_of(messages[: i + 1])
        if not (whole.startswith(after.rstrip()) and after.startswith(before)):
            placed.refuse(
                "the chat template writes earlier messages otherwise once later ones follow: what the "
                "assistant said cannot be told apart; give each answer as a chat of its own"
            )
        yield len(before), len(after.rstrip())


def _is_inside(token: Span, spans: Sequence[Span]) -> bool:
    return token[0] < token[1] and any(start <= token[0] and token[1] <= stop for start, stop in spans)
