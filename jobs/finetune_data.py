"""Examples to finetune on, from what a recipe says of them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axicon.data.chat import chats
from axicon.data.prompts import Prompt, tokenise
from axicon.data.table import read_table
from axicon.data.tasks import TASKS, Split, locate
from axicon.data.text import read_rows
from axicon.data.tokenised import Tokenised
from axicon.data.windows import windows
from axicon.errors import AxiconError
from axicon.finetune.objectives import OBJECTIVES
from axicon.protocols import Objective
from jobs.finetune_recipe import DataRecipe, FinetuneRecipe

OWN = ("train", "evaluate", "template", "verbalizer", "options")


@dataclass(frozen=True)
class Data:
    train: Tokenised
    evaluate: Tokenised | None
    objective: Objective
    sha256: str
    """Of everything that is trained on."""
    evaluate_sha256: str

    @property
    def notes(self) -> list[str]:
        """What a user should know of it."""
        cut = self.train.shortened
        said = f"{len(self.train):,} examples, {self.train.tokens:,} tokens"
        return [said + (f"; {cut} were cut to data.max_tokens" if cut else "")]


def read(recipe: FinetuneRecipe, tokenizer: Any, most: int) -> Data:
    """`most` is how many tokens the model knows. Raises AxiconError, with the place of what is wrong."""
    asked = recipe.data
    if asked.max_tokens is not None and asked.max_tokens > most:
        raise AxiconError(f"data.max_tokens={asked.max_tokens}: the model knows {most} positions")
    if recipe.batch % recipe.shards:
        raise AxiconError(f"batch={recipe.batch} does not divide among shards={recipe.shards}")
    tokens = asked.max_tokens or min(512, most)
    train = _read(recipe, tokenizer, "train", tokens)
    assert train is not None
    default = "choice" if train.examples[0].answer is not None else "language"
    objective = recipe.objective
    made = OBJECTIVES[default]() if objective is None else objective.build(OBJECTIVES, "objective")
    evaluate = _read(recipe, tokenizer, "evaluate", tokens)
    return Data(train, evaluate, made, _sha256(train), "" if evaluate is None else _sha256(evaluate))


def _read(recipe: FinetuneRecipe, tokenizer: Any, split: Split, tokens: int) -> Tokenised | None:
    asked, limit = recipe.data, recipe.data.limit if split == "train" else recipe.data.evaluate_limit
    settings: dict[str, Any] = {"batch": recipe.batch, "seed": recipe.seed}
    prompt = _prompt(asked)
    source = asked.train if split == "train" else asked.evaluate
    if asked.task is not None:
        source = locate(TASKS[asked.task], split, _folder(asked))
    if source is None:
        if split == "train":
            raise AxiconError(
                "nothing to train on: give data.task=sst2, or data.train=FILE with data.template and "
                "data.verbalizer, with data.form=chats, or with data.form=text"
            )
        return None
    if asked.form == "text":
        rows = read_rows(source, column=asked.column or "text")[:limit]
        return windows(rows, tokenizer, window=tokens, **settings)
    table = read_table(source, split=split if split == "train" else "validation", limit=limit)
    settings["max_tokens"] = tokens
    if asked.form == "chats":
        return chats(table, tokenizer, column=asked.column or "messages", **settings)
    assert prompt is not None
    return tokenise(prompt, table, tokenizer, **settings)


def _prompt(asked: DataRecipe) -> Prompt | None:
    if asked.task is not None:
        if asked.task not in TASKS:
            raise AxiconError(f"data.task={asked.task}: known are {', '.join(TASKS)}")
        given = [name for name in OWN if getattr(asked, name)]
        if given or asked.form != "prompts":
            raise AxiconError(
                f"data.task={asked.task} has prompts and files of its own: leave out "
                f"{', '.join(f'data.{name}' for name in given) or 'data.form'}, or the task"
            )
        return TASKS[asked.task].prompt
    if asked.form != "prompts":
        return None
    if asked.template is None:
        if asked.train is None:
            return None
        raise AxiconError("data.form=prompts wants data.template and data.verbalizer or data.options")
    return Prompt(
        template=asked.template,
        verbalizer=asked.verbalizer,
        options=asked.options,
        label=asked.label,
        shorten=asked.shorten,
    )


def _folder(asked: DataRecipe) -> Path | None:
    """Where files of tasks are; None for the hub."""
    if asked.folder is not None:
        return asked.folder
    if named := os.environ.get("AXICON_DATA"):
        return Path(named)
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def _sha256(data: Tokenised) -> str:
    total = hashlib.sha256(repr(data.choices).encode())
    for example in data.examples:
        total.update(repr((example.answer, *map(tuple, example.rows))).encode())
    return total.hexdigest()
