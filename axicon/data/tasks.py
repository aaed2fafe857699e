"""The tasks of the zeroth-order benchmark (arXiv:2402.11592), put as MeZO (arXiv:2305.17333) puts them.

Files are looked for in a folder, by the names below with a suffix of `axicon.data.records`; without one the
data sets come from the hub. Labels of both are in the verbalizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from axicon.data.prompts import Prompt
from axicon.data.records import RECORD_SUFFIXES
from axicon.errors import AxiconError

Split = Literal["train", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Task:
    prompt: Prompt
    train: tuple[str, ...]
    """Files, the first that exists wins."""
    evaluate: tuple[str, ...]
    hub: str
    """Data set of the hub, with its splits `train` and `validation`."""


def _superglue(name: str, prompt: Prompt) -> Task:
    """A small task of SuperGLUE, under the names of its files."""
    return Task(
        prompt=prompt,
        train=(f"superglue-small/{name}_train", f"{name}/train"),
        evaluate=(f"superglue-small/{name}_dev", f"{name}/dev", f"{name}/validation"),
        hub=f"aps/super_glue:{name}",
    )


TASKS: dict[str, Task] = {
    "sst2": Task(
        prompt=Prompt(
            template="{{ sentence.strip() }} It was",
            verbalizer={"0": " terrible", "1": " great", "negative": " terrible", "positive": " great"},
        ),
        train=("sst2/train", "sst2/train_2000"),
        evaluate=("sst2/dev", "sst2/dev_shared", "sst2/validation"),
        hub="nyu-mll/glue:sst2",
    ),
    "rte": Task(
        prompt=Prompt(
            template='{{ premise }}\nDoes this mean that "{{ hypothesis }}" is true? Yes or No?\n',
            verbalizer={"entailment": "Yes", "not_entailment": "No", "0": "Yes", "1": "No"},
        ),
        train=("rte/train", "rte/train_2000"),
        evaluate=("rte/dev", "rte/validation"),
        hub="aps/super_glue:rte",
    ),
    "boolq": _superglue(
        "boolq",
        Prompt(
            template="{{ passage }} {{ question[0]|upper }}{{ question[1:] }}?\n",
            verbalizer={"true": "Yes", "false": "No", "1": "Yes", "0": "No"},
        ),
    ),
    "copa": _superglue(
        "copa",
        Prompt(
            template="{{ premise.strip().rstrip('.') }} {{ 'so' if question == 'effect' else 'because' }}",
            options=(
                " {{ choice1[0]|lower }}{{ choice1[1:] }}",
                " {{ choice2[0]|lower }}{{ choice2[1:] }}",
            ),
            shorten="premise",
        ),
    ),
    "cb": _superglue(
        "cb",
        Prompt(
            template='Suppose {{ premise }} Can we infer that "{{ hypothesis }}"? Yes, No, or Maybe?\n',
            verbalizer={
                "entailment": "Yes", "contradiction": "No", "neutral": "Maybe",
                "0": "Yes", "1": "No", "2": "Maybe",
            },
        ),
    ),
}  # fmt: skip


def locate(task: Task, split: Split, folder: Path | None) -> str:
    """Where the records of a split are, as `read_table` takes it. Raises AxiconError where no file is."""
    if folder is None:
        return f"{task.hub}:{'train' if split == 'train' else 'validation'}"
    root = folder.expanduser()
    names = task.train if split == "train" else task.evaluate
    for path in (root / f"{name}{suffix}" for name in names for suffix in RECORD_SUFFIXES):
        if path.is_file():
            return str(path)
    wanted = " or ".join(f"{name}{{{','.join(RECORD_SUFFIXES)}}}" for name in names)
    raise AxiconError(f"{root}: no such folder" if not root.is_dir() else f"{root}: holds no {wanted}")
