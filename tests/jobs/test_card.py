"""`axicon card` from a compressed directory to its card, and what others make of that."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from axicon.errors import AxiconError
from axicon.evaluate import agreement, serving, speed
from axicon.evaluate.card import ZERO_SHOT
from axicon.kernels import native
from axicon.model import checkpoint
from axicon.recipe import CompressRecipe, EvaluateRecipe
from jobs import __main__ as command
from jobs import card, compare, compress, evaluate, stop, verify
from jobs.card_file import Card
from jobs.card_recipe import CardRecipe
from jobs.progress import Reporter
from jobs.report import Report
from tests.evaluate.tiny import PROSE, make_tokenizer, save_model

SST2 = [{"sentence": "a gorgeous film .", "label": 1}, {"sentence": "dull .", "label": 0}]


@pytest.fixture(autouse=True)
def _quick(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "measure", serving.measure_here)
    monkeypatch.setattr(agreement, "PROMPTS", agreement.PROMPTS[:4])
    monkeypatch.setattr(agreement, "NEW_TOKENS", 8)
    few = {"prompt_tokens": 8, "rounds": 1}
    monkeypatch.setattr(speed.rates, "__kwdefaults__", speed.rates.__kwdefaults__ | few | {"new_tokens": 4})
    monkeypatch.setattr(speed.first_token, "__kwdefaults__", few)


@pytest.fixture(scope="module", autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.why_unavailable()  # compiled here once, and not again in the caches of the tests
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(folder, make_tokenizer(add_bos=False), positions=320)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(PROSE * 4)
    return str(tmp_path / "text.txt")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(record) for record in SST2))
    return folder.parent


def made(dense: Path, out: str = "small", **settings: Any) -> Report:
    values = {"model": str(dense), "out": Path(out), "threads": 1, "compressor": "llm_int8", **settings}
    return compress.run(CompressRecipe(**values), Reporter(io.StringIO()))


def filled(model: str = "small", said: io.StringIO | None = None, **settings: Any) -> Report:
    recipe = CardRecipe(model=model, threads=1, **settings)
    return card.run(recipe, Reporter(said or io.StringIO()))


def content(folder: str = "small") -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "card.json").read_text()))


class TestCompress:
    def test_what_takes_seconds_is_measured_and_the_rest_says_how(self, dense: Path) -> None:
        report = made(dense)
        found = content()
        assert (found["format_version"], found["name"]) == (1, "small")
        assert found["base"] == {"name": "tiny", "sha256": checkpoint.digest(dense)}
        figures = found["figures"]
        later = {"perplexity", *(f"{task}/acc" for task in ZERO_SHOT)}
        assert {name for name, row in figures.items() if row["compressed"] is None} == later
        assert {name for name, row in figures.items() if row["dense"] is None} == later | {
            "agreement/prefix", "agreement/equal"
        }  # fmt: skip
        assert figures["perplexity"]["reason"]["compressed"] == "no text was given"
        assert figures["perplexity"]["command"] == "axicon card DIR text=FILE"
        assert figures["rte/acc"]["command"] == "axicon card DIR data=FOLDER"
        assert figures["bytes"]["dense"] == (dense / "model.safetensors").stat().st_size
        assert figures["bytes/embedding"]["dense"] > 0
        report_json = json.loads(Path("small/report.json").read_text())
        assert report_json["tokens_per_s"]["8"] == figures["tokens_per_s/8"]["compressed"]
        assert report_json["bytes"]["total"] == figures["bytes"]["compressed"]
        assert found["judgement"] == report.details["judgement"]

    def test_the_readme_is_for_people(self, dense: Path) -> None:
        made(dense)
        said = Path("small/README.md").read_text()
        assert said.startswith("# small\n\ntiny, made smaller by llm_int8")
        assert f"**{content()['judgement']}**" in said
        assert "| | dense | this model | change |" in said
        assert "| tokens/s, 8 streams | " in said
        assert "axicon serve ./small" in said
        assert '"threshold"' not in said
        assert "threshold 6.0" in said
        assert "4 prompts" in said
        assert "perplexity: no text was given. `axicon card DIR text=FILE`" in said
        assert str(Path.cwd()) not in said
        assert "None" not in said

    def test_the_card_is_no_part_of_what_is_verified(self, dense: Path) -> None:
        made(dense, measure=False)
        before = verify.run("small")
        assert before.problems == []
        Path("small/README.md").write_text("mine")
        Path("small/card.json").unlink()
        assert verify.run("small").problems == []
        Path("small/card.json").write_text('{"format_version": 1, "figures": {"bytes": {"dense": "many"}}}')
        [problem] = verify.run("small").problems
        assert problem.file == "card.json"
        assert "bytes.dense" in problem.what

    def test_without_measuring_there_is_a_card_of_reasons(self, dense: Path) -> None:
        made(dense, measure=False)
        row = content()["figures"]["first_token_ms"]
        assert row["reason"] == {"dense": "measure=false", "compressed": "measure=false"}
        assert row["command"] == "axicon card DIR"
        filled()
        assert content()["figures"]["first_token_ms"]["compressed"] > 0


class TestCard:
    def test_text_and_tasks_fill_the_rest(self, dense: Path, text: str, data: Path) -> None:
        made(dense)
        speeds = content()["figures"]["tokens_per_s/1"]
        report = filled(text=text, window=32, windows=2, data=data, tasks=("sst2",))
        figures = content()["figures"]
        for kind, place in (("dense", dense), ("compressed", Path("small"))):
            asked: dict[str, Any] = {
                "text": text,
                "window": 32,
                "windows": 2,
                "tasks": ("sst2",),
                "data": data,
            }
            recipe = EvaluateRecipe(model=str(place), threads=1, limit=100, out=Path("out"), **asked)
            again = evaluate.run(recipe, Reporter(io.StringIO())).metrics
            assert figures["perplexity"][kind] == again["perplexity"]
            assert figures["sst2/acc"][kind] == again["sst2/acc"]
        assert figures["sst2/acc"]["basis"]["examples shown"] == 0
        assert figures["sst2/acc"]["basis"]["questions"] == 2
        assert figures["tokens_per_s/1"] == speeds  # there already
        assert report.metrics["perplexity"] == figures["perplexity"]["compressed"]
        assert json.loads(Path("small/report.json").read_text())["perplexity"]["windows"] == 2
        assert "sst2: lm-eval, zero-shot, 2 questions, bfloat16" in Path("small/README.md").read_text()

    def test_the_dense_model_is_asked_once(
        self, dense: Path, text: str, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {"text": text, "window": 32, "windows": 2, "data": data, "tasks": ("sst2",)}
        made(dense)
        filled(**asked)
        made(dense, "other", compressor={"method": "llm_int8", "relative": 3.0})
        load, loaded = checkpoint.load, []

        def watched(path: Path, **options: Any) -> Any:
            loaded.append(Path(path).name)
            return load(path, **options)

        monkeypatch.setattr(checkpoint, "load", watched)
        filled("other", **asked)
        assert loaded == ["other"]
        first, second = content()["figures"], content("other")["figures"]
        for name in ("perplexity", "sst2/acc", "outliers/kurtosis"):
            assert first[name]["dense"] == second[name]["dense"]

    def test_a_stopped_run_goes_on(self, dense: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made(dense, measure=False)
        asked: dict[str, Any] = {"text": text, "window": 32, "windows": 3, "serving": False}
        measure, done = Card.put, []

        def stopping(self: Card, name: str, kind: str, *rest: Any, **more: Any) -> None:
            if (name, kind) == ("perplexity", "compressed"):
                raise stop.Stopped
            measure(self, name, kind, *rest, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Card, "put", stopping)
        with pytest.raises(stop.Stopped) as caught:
            filled(**asked)
        assert "`axicon card small` goes on" in caught.value.kept
        assert content()["figures"]["perplexity"]["dense"] > 0
        monkeypatch.setattr(Card, "put", measure)
        monkeypatch.setattr(checkpoint, "load", lambda *_, **__: done.append(1))  # all windows are known
        filled(**asked)
        assert (done, content()["figures"]["perplexity"]["compressed"] > 0) == ([], True)

    def test_a_dense_model_that_is_gone_is_a_reason(self, dense: Path, text: str, tmp_path: Path) -> None:
        shutil.copytree(dense, tmp_path / "parent")
        made(tmp_path / "parent", measure=False)
        shutil.rmtree(tmp_path / "parent")
        filled(text=text, window=32, windows=2)
        figures = content()["figures"]
        assert figures["perplexity"]["compressed"] > 0
        for name in ("perplexity", "tokens_per_s/1"):
            assert figures[name]["reason"]["dense"] == (
                f"the dense model is not at {tmp_path / 'parent'} any more"
            )
        assert "greedy texts are not known" in figures["agreement/prefix"]["reason"]["compressed"]

    def test_what_is_measured_otherwise_takes_the_place(self, dense: Path, text: str) -> None:
        made(dense, text=text, window=32, windows=2, measure=False)
        both = content()["figures"]["perplexity"]
        assert both["dense"] is not None
        recipe = EvaluateRecipe(model="small", threads=1, text=text, window=32, windows=3, out=Path("out"))
        value = evaluate.run(recipe, Reporter(io.StringIO())).metrics["perplexity"]
        row = content()["figures"]["perplexity"]
        assert (row["compressed"], row["dense"]) == (value, None)
        filled(text=text, window=32, windows=3, serving=False)
        assert content()["figures"]["perplexity"]["dense"] is not None

    @pytest.mark.parametrize(
        ("model", "settings", "says"),
        [
            ("tiny", {}, "name a directory that axicon compress made"),
            ("none", {}, "name a directory that axicon compress made"),
            ("small", {"text": "none.txt"}, "none.txt"),
            ("small", {"data": Path("none")}, "data=none: no such folder"),
            ("broken", {}, "card.json: holds no figures; remove the file"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, model: str, settings: dict[str, Any], says: str, dense: Path, tmp_path: Path
    ) -> None:
        made(dense, measure=False)
        shutil.copytree(dense, tmp_path / "tiny")
        shutil.copytree("small", "broken")
        Path("broken/card.json").write_text('{"format_version": 1}')
        with pytest.raises(AxiconError, match=says) as caught:
            filled(model, **settings)
        assert "\n" not in str(caught.value)

    def test_the_command_itself(self, dense: Path) -> None:
        made(dense, measure=False)
        words = ["card", "small", "threads=1"]
        said = CliRunner().invoke(command.axicon, words, catch_exceptions=False).output
        assert "greedy tokens before the first difference" in said
        assert "not measured: perplexity: no text was given. `axicon card DIR text=FILE`" in said
        assert "all of it is in small/README.md" in said


class TestOthers:
    def test_evaluate_adds_what_it_measured(self, dense: Path, data: Path) -> None:
        made(dense, measure=False)
        recipe = EvaluateRecipe(model="small", threads=1, tasks=("sst2",), data=data, out=Path("out"))
        said = io.StringIO()
        score = evaluate.run(recipe, Reporter(said)).metrics["sst2/acc"]
        assert content()["figures"]["sst2/acc"]["compressed"] == score
        assert "now holds tasks" in said.getvalue()

    def test_compare_takes_the_dense_column_from_the_card(self, dense: Path, text: str, data: Path) -> None:
        made(dense)
        filled(text=text, window=32, windows=2, data=data, tasks=("sst2",))
        found = compare.run(compare.CompareRecipe(model=(str(dense), "small"), plot=None))
        for row in ("perplexity", "sst2 acc", "tokens/s, 8 streams", "first token", "peak memory"):
            assert [cell.comparable for cell in found.rows[row]] == [True, True], row
        figures = content()["figures"]
        assert [c.figure.value for c in found.rows["perplexity"]] == [
            figures["perplexity"][kind] for kind in ("dense", "compressed")
        ]
