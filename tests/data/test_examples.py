"""Records become examples: what is scored, what is cut, and what is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from axicon.data.chat import chats
from axicon.data.prompts import Prompt, tokenise
from axicon.data.table import Placed, read_table
from axicon.data.tasks import TASKS, locate
from axicon.data.tokenised import Example, Row, Tokenised
from axicon.data.windows import windows
from axicon.errors import AxiconError
from tests.evaluate.tiny import PROSE, make_tokenizer

PROMPT = Prompt(template="{{ text }} It was", verbalizer={"0": " wet", "1": " dry"})
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(add_bos=request.param)


def placed(*records: dict[str, Any]) -> list[Placed]:
    return [Placed(f"set.jsonl, line {i}", record) for i, record in enumerate(records, start=1)]


def texts(tokenizer: PreTrainedTokenizerFast, made: Tokenised, scored: bool) -> list[str]:
    rows = [row for example in made.examples for row in example.rows]
    return [tokenizer.decode([t for t, s in zip(*row, strict=True) if s or not scored]) for row in rows]


def test_only_the_first_token_of_the_answer_is_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = placed({"text": "The rain", "label": 0}, {"text": "Nothing", "label": 1})
    made = tokenise(PROMPT, rows, tokenizer, max_tokens=64, batch=2)
    assert [example.answer for example in made.examples] == [0, 1]
    assert made.choices is not None
    starts = ["<s>" * (tokenizer("")["input_ids"] != []) + text for text in ("The rain", "Nothing")]
    first = [tokenizer.decode([token]) for token in made.choices]
    whole = [f"{start} It was{word}" for start, word in zip(starts, first, strict=True)]
    assert texts(tokenizer, made, False) == whole
    assert texts(tokenizer, made, True) == first
    assert first[0] != first[1]
    batch = next(made.batches())
    assert batch.scored == 2
    assert batch.answer is not None
    assert batch.answer.tolist() == [0, 1]
    assert (batch.input_ids[~batch.mask] == 0).all()


def test_a_label_may_share_its_word_and_be_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt(template="{{ text }}", verbalizer={"true": " a", "false": " b", "yes": " a"})
    rows = placed(*({"text": "x", "label": label} for label in (True, False, "yes")))
    made = tokenise(prompt, rows, tokenizer, max_tokens=9)
    assert [example.answer for example in made.examples] == [0, 1, 0]


def test_options_are_rows_of_one_example(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt(template="{{ a }} so", options=(" {{ b }}", " {{ c }}"))
    rows = placed({"a": "The lamp went out", "b": "she waited", "c": "it rained.", "label": 1})
    made = tokenise(prompt, rows, tokenizer, max_tokens=64)
    assert texts(tokenizer, made, True) == [" she waited", " it rained."]
    batch = next(made.batches())
    assert (len(batch), batch.options, batch.choices) == (1, 2, None)
    assert batch.input_ids.shape[0] == 2


def test_a_long_text_loses_its_beginning_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt(template="Q {{ text }} It was", verbalizer=PROMPT.verbalizer)
    rows = placed({"text": PROSE, "label": 1}, {"text": "short", "label": 1})
    made = tokenise(prompt, rows, tokenizer, max_tokens=24)
    assert made.shortened == 1
    (long, short) = texts(tokenizer, made, False)
    assert 20 <= len(made.examples[0].rows[0].tokens) <= 24
    kept = long.removeprefix("<s>").removeprefix("Q ").partition(" It was")[0]
    assert PROSE.endswith(kept)
    assert "Q " in long
    assert "Q short It was" in short


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "x", "label": 2}, "line 2: label 2 is not in the verbalizer, which has 0, 1"),
        ({"text": "x"}, "line 2: no label in field 'label'; it has text"),
        ({"text": " ", "label": 0}, "line 2: 'text' is empty"),
        ({"label": 0}, "line 2: no field 'text'; it has label"),
        ({"text": None, "label": 0}, "line 2: no field 'text'"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(
    tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], says: str
) -> None:
    with pytest.raises(AxiconError) as caught:
        tokenise(PROMPT, placed({"text": "x", "label": 0}, record), tokenizer, max_tokens=64)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (
            Prompt(template="{{ text }} It was", verbalizer={"0": " xq", "1": " xz"}),
            "' xq' and ' xz' begin with the same token",
        ),
        (
            Prompt(template="{{ text }} It was ", verbalizer={"0": "wet", "1": "dry"}),
            "end the template without a blank",
        ),
        (
            Prompt(template="{{ text.nothing() }}", verbalizer={"0": " a", "1": " b"}),
            "line 1: the template does not fit this record",
        ),
        (
            Prompt(template="{{ 'never ' * 30 }}{{ text }}", verbalizer={"0": " a", "1": " b"}),
            "line 1: .* tokens, at most 40 fit, and 'text' alone is too short",
        ),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(prompt: Prompt, says: str) -> None:
    corpus = make_tokenizer()
    with pytest.raises(AxiconError, match=says):
        tokenise(prompt, placed({"text": "was the", "label": 0}), corpus, max_tokens=40)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": "{{ a"}, "template '{{ a'"),
        ({"template": "{{ a }}", "verbalizer": {"0": "x", "1": "x"}}, "at least two answers"),
        ({"template": "{{ a }}", "verbalizer": None}, "one of them"),
        ({"template": "{{ a }}", "shorten": "b"}, "shorten=b: the template has no such field, it has a"),
    ],
)
def test_a_prompt_is_checked_when_it_is_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(AxiconError) as caught:
        Prompt(**({"verbalizer": {"0": "x", "1": "y"}} | settings))
    assert says in str(caught.value)


def numbered(count: int, batch: int, seed: int = 0) -> Tokenised:
    return Tokenised([Example((Row((i, i), (False, True)),)) for i in range(count)], batch, seed)


def firsts(made: Tokenised, steps: Sequence[int]) -> list[int]:
    return [int(i) for step in steps for i in made.batch(step).input_ids[:, 0]]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    made = numbered(7, 3)
    assert sorted(firsts(made, range(7))) == sorted(list(range(7)) * 3), "three passes in seven batches"
    assert sorted(firsts(made, range(7))[:7]) == list(range(7)), "no example again before every one was there"
    assert firsts(numbered(7, 3), [5]) == firsts(made, [5]), "asked for alone"
    assert firsts(numbered(7, 3, seed=1), range(7)) != firsts(made, range(7))
    assert firsts(made, [0, 1]) != firsts(made, [2, 3])


def test_a_batch_larger_than_the_set_takes_it_more_than_once() -> None:
    assert sorted(firsts(numbered(2, 6), [0])) == [0, 0, 0, 1, 1, 1]


def test_shards_are_the_batch_in_parts() -> None:
    batch = numbered(8, 4).batch(1)
    parts = list(batch.shards(2))
    assert [int(i) for part in parts for i in part.input_ids[:, 0]] == batch.input_ids[:, 0].tolist()
    with pytest.raises(ValueError, match="4 examples do not divide among 3 shards"):
        batch.shards(3)


def test_every_token_of_a_window_but_the_first_is_scored() -> None:
    tokenizer = make_tokenizer()
    made = windows([PROSE, PROSE], tokenizer, window=16)
    ids = tokenizer(PROSE + "\n\n" + PROSE)["input_ids"]
    assert [token for example in made.examples for token in example.rows[0].tokens] == ids[
        : len(ids) // 16 * 16
    ]
    assert made.examples[0].rows[0].scored == (False, *[True] * 15)
    with pytest.raises(AxiconError, match="less than one window of 999"):
        windows([PROSE], tokenizer, window=999)


def chat(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_only_what_the_assistant_says_is_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    rows = placed(chat(("user", "hi"), ("assistant", "the lamp"), ("user", "and?"), ("assistant", "rain")))
    made = chats(rows, tokenizer, max_tokens=200)
    assert texts(tokenizer, made, True) == ["the lamp</s>rain</s>"]
    cut = chats(rows, tokenizer, max_tokens=12)
    assert cut.shortened == 1
    assert texts(tokenizer, cut, True)[0].endswith("rain</s>")
    assert len(cut.examples[0].rows[0].tokens) == 12


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (chat(("user", "hi")), "line 1: the assistant says nothing"),
        ({"messages": "hi"}, "line 1: no messages in field 'messages'"),
        ({"messages": [{"role": "user"}]}, "line 1: message 1 is no mapping with `role` and `content`"),
    ],
)
def test_what_is_no_chat_is_refused(record: dict[str, Any], says: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    with pytest.raises(AxiconError) as caught:
        chats(placed(record), tokenizer, max_tokens=99)
    assert says in str(caught.value)


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    rows = placed(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    with pytest.raises(AxiconError, match="cannot be told apart"):
        chats(rows, tokenizer, max_tokens=99)


def test_a_record_knows_its_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(["", json.dumps({"a": 1}), "", json.dumps({"a": 2})]))
    assert [row.where for row in read_table(path)] == [f"{path}, line 2", f"{path}, line 4"]
    assert len(read_table(path, limit=1)) == 1
    path.write_text("\n")
    with pytest.raises(AxiconError, match="holds no records"):
        read_table(path)


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_tasks_fit_their_files(name: str, data_dir: Path) -> None:
    task = TASKS[name]
    tokenizer = make_tokenizer()
    for split in ("train", "evaluate"):
        rows = read_table(locate(task, split, data_dir), limit=20)  # type: ignore[arg-type]
        made = tokenise(task.prompt, rows, tokenizer, max_tokens=2000)
        assert len({example.answer for example in made.examples}) > 1
        assert made.shortened == 0


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"holds no sst2/train\{.*or sst2/train_2000"):
        locate(TASKS["sst2"], "train", tmp_path)
    assert locate(TASKS["sst2"], "evaluate", None) == "nyu-mll/glue:sst2:validation"
