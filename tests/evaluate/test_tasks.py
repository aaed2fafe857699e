"""The shipped tasks on local files: the prompts are lm-eval's own, the files are checked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from axicon.errors import AxiconError
from axicon.evaluate.local_data import load, macro_f1
from axicon.evaluate.run import TASKS_DIR, Tasks, local_tasks

# One training and one test record of each task as in the local files, the latter in the hub's fields too.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "lambada/lambada_test": [{"text": "He said it was late, and she said it was not that late"}],
    "sst2/dev": [{"sentence": "a gorgeous film .", "label": 1}],
    "rte/dev": [{"premise": "Tom has a boat.", "hypothesis": "Tom rows.", "label": "not_entailment"}],
    "superglue-small/boolq_dev": [{"passage": "Rain is wet.", "question": "is rain wet", "label": True}],
    "superglue-small/copa_dev": [
        {
            "premise": "The man's tap leaked.",
            "question": "cause",
            "choice1": 'He "fixed" it.',
            "choice2": "It's old.",
            "label": 1,
        }
    ],
    "superglue-small/cb_dev": [{"premise": "Is it so?", "hypothesis": "it is so", "label": "neutral"}],
    "gsm8k/test": [{"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "gsm8k/train": [
        {"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(8)
    ],
}
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "lambada": ("lambada/lambada_openai.yaml", RECORDS["lambada/lambada_test"][0]),
    "sst2": ("glue/sst2/default.yaml", RECORDS["sst2/dev"][0]),
    "rte": ("glue/rte/default.yaml", {"sentence1": "Tom has a boat.", "sentence2": "Tom rows.", "label": 1}),
    "boolq": ("super_glue/boolq/default.yaml", {**RECORDS["superglue-small/boolq_dev"][0], "label": 1}),
    "copa": ("super_glue/copa/default.yaml", RECORDS["superglue-small/copa_dev"][0]),
    "cb": ("super_glue/cb/default.yaml", {**RECORDS["superglue-small/cb_dev"][0], "label": 2}),
    "gsm8k": ("gsm8k/gsm8k.yaml", RECORDS["gsm8k/test"][0]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for stem, records in RECORDS.items():
        path = root / f"{stem}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))
    return root


class Recorder(LM):
    """Keeps what it is asked, and answers: the shortest continuation is best."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-float(len(request.args[1])), True) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no shipped task asks for this")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [request.args for request in requests]
        return ["so it is\n#### 5" for _ in requests]


def test_every_task_file_is_checked_here() -> None:
    assert local_tasks() == sorted(HUB)


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")  # lm-eval's F1 of a class that does not occur
@pytest.mark.parametrize("task", sorted(HUB))
def test_prompts_and_settings_are_those_of_lm_eval(task: str, folder: Path) -> None:
    ours = Recorder()
    results = Tasks([task], data_dir=folder).run(ours)

    file, record = HUB[task]
    splits = {name: datasets.Dataset.from_list([record]) for name in ("test", "validation")}
    splits["train"] = datasets.Dataset.from_list(RECORDS["gsm8k/train"] if task == "gsm8k" else [record])
    path = Path(lm_eval.__file__).parent / "tasks" / file
    theirs = Recorder()
    manager = TaskManager(include_defaults=False)
    config = {**_load_yaml(path), "custom_dataset": lambda **_: datasets.DatasetDict(splits)}
    expected = lm_eval.simple_evaluate(model=theirs, tasks=[config], task_manager=manager, bootstrap_iters=0)

    assert ours.asked == theirs.asked
    (scores,), (expected_scores,) = results["results"].values(), expected["results"].values()
    measured = {key for key in scores if "," in key and "stderr" not in key}
    assert measured == {key for key in expected_scores if "," in key and "stderr" not in key}
    for key in measured - {"f1,none"}:
        assert scores[key] == expected_scores[key]


def _load_yaml(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path, resolve_func=True))


def test_results_are_comparable_between_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Tasks(["sst2", "rte"], data_dir=folder).run(Recorder())
    monkeypatch.setattr("torch.utils.collect_env.run", lambda *_: pytest.fail("asked the machine twice"))
    second = Tasks(["sst2", "rte"], data_dir=folder).run(Recorder())
    assert "PyTorch version" in first["pretty_env_info"]
    assert first["pretty_env_info"] == second["pretty_env_info"]
    assert first["task_hashes"] == second["task_hashes"]
    assert set(first["task_hashes"]) == {"sst2", "rte"}
    assert first["results"] == second["results"]
    assert first["n-samples"]["sst2"] == {"original": 1, "effective": 1}


def test_limit_takes_the_first_documents(data_dir: Path) -> None:
    recorder = Recorder()
    results = Tasks(["lambada"], data_dir=data_dir).run(recorder, limit=3)
    assert results["n-samples"]["lambada"] == {"original": 5153, "effective": 3}
    assert [continuation for _, continuation in recorder.asked] == [" signs", " Shane", " insurance"]


@pytest.mark.parametrize("task", sorted(HUB))
def test_the_public_files_are_read_whole(task: str, data_dir: Path) -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    config = yaml.load((TASKS_DIR / f"{task}.yaml").read_text(), Loader)
    splits = load(**config["dataset_kwargs"], data_dir=str(data_dir))
    counts = {"lambada": 5153, "sst2": 582, "rte": 277, "boolq": 3270, "copa": 100, "cb": 56, "gsm8k": 880}
    assert len(splits["test" if "test" in splits else "validation"]) == counts[task]
    if "labels" in config["dataset_kwargs"]:
        assert set(splits["validation"]["label"]) == set(range(len(config["dataset_kwargs"]["labels"])))


def test_examples_need_training_records(folder: Path) -> None:
    with pytest.raises(AxiconError, match="num_fewshot=2: sst2 has 0 training records"):
        Tasks(["sst2"], data_dir=folder).run(Recorder(), fewshot=2)


@pytest.mark.usefixtures("few_lm_eval_tasks")
def test_an_unknown_task_is_named(folder: Path) -> None:
    with pytest.raises(
        AxiconError, match=r"no task named lambda: boolq, .*sst2 read local files, `lm_eval ls"
    ):
        Tasks(["lambda"], data_dir=folder)


def test_no_task_at_all_says_which_there_are() -> None:
    with pytest.raises(AxiconError, match="no task named; those that read local files are boolq"):
        Tasks([])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"data=.*/none: no such folder"):
        Tasks(["sst2"], data_dir=tmp_path / "none")
    with pytest.raises(AxiconError, match=r"include=.*/none: no such folder"):
        Tasks(["sst2"], include=[tmp_path / "none"])


def test_a_missing_file_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"holds no sst2/dev\{.jsonl,.*\(records with sentence, label\)"):
        Tasks(["sst2"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([{"sentence": "x"}], "record 1: lacks label; it has sentence"),
        ([{"sentence": "x", "label": -1}], "record 1: label -1 is none of negative, positive"),
        (
            [{"sentence": "x", "label": 1}, {"sentence": "y", "label": "great"}],
            "record 2: label 'great' is none",
        ),
        ([], "holds no records"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path: Path, records: list[dict[str, Any]], says: str) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    with pytest.raises(AxiconError, match=says):
        Tasks(["sst2"], data_dir=tmp_path)


@pytest.mark.usefixtures("few_lm_eval_tasks")
def test_a_task_of_the_hub_without_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_: Any) -> None:
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(AxiconError, match=r"cannot load sst2: the hub is away; with data=DIR, sst2 can read"):
        Tasks(["sst2"])


def test_own_task_files_are_found(folder: Path, tmp_path: Path) -> None:
    text = (TASKS_DIR / "sst2.yaml").read_text().replace("task: sst2", "task: mood").replace("Question", "Q")
    (tmp_path / "mood.yaml").write_text(text)
    recorder = Recorder()
    Tasks(["mood"], data_dir=folder, include=[tmp_path]).run(recorder)
    assert recorder.asked[0] == (
        "a gorgeous film .\nQ: Is this sentence positive or negative?\nAnswer:",
        " negative",
    )


def test_macro_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    gold, predicted = [0, 0, 1, 2, 2, 2, 1], [0, 1, 1, 2, 0, 2, 1]
    expected = f1_score(gold, predicted, average="macro")
    assert macro_f1(list(zip(gold, predicted, strict=True))) == pytest.approx(expected)
