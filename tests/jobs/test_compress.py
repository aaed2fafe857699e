"""`axicon compress` from a recipe to a directory, and whatever can go wrong on the way."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from axicon.compress import COMPRESSORS, directory
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.walk import Compress
from axicon.errors import AxiconError, RunFailed
from axicon.evaluate import serving, speed
from axicon.generate.build import build_engine
from axicon.generate.local import LocalModel
from axicon.kernels import native
from axicon.model import checkpoint, machine
from axicon.model.artefact import MEASURED, claim
from axicon.model.decoder import Decoder
from axicon.recipe import SERVED_BY_DEFAULT, CompressRecipe, EvaluateRecipe, LocalServeRecipe, ServeRecipe
from jobs import __main__ as command
from jobs import compress, evaluate, prepare, stop
from jobs.progress import Reporter
from jobs.report import Report
from tests.faults import failing, failures
from tests.services.fake_engine import byte_tokenizer

INT8 = {"method": "llm_int8", "relative": 5.0}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "cache"))
    # Another process takes seconds to start; tests/evaluate has one.
    monkeypatch.setattr(serving, "measure", serving.measure_here)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths the C++ kernels take, with a tied head and a tokenizer."""
    native.why_unavailable()  # compiled here once, and not again in the caches of the tests
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=256, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "notes.txt").write_text("not the model")
    (folder / "LICENSE").write_text("free")
    return folder


def recipe(dense: Path, out: Path, **settings: Any) -> CompressRecipe:
    values = {"model": str(dense), "out": out, "threads": 1, "measure": False, "compressor": INT8, **settings}
    return CompressRecipe(**values)


def run(dense: Path, out: Path, said: io.StringIO | None = None, **settings: Any) -> Report:
    return compress.run(recipe(dense, out, **settings), Reporter(said or io.StringIO()))


def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("The lamp went out. She waited for the door. " * 20)
    return path


class TestWhatIsMade:
    def test_a_directory_with_everything_a_server_needs(self, dense: Path, tmp_path: Path) -> None:
        said, out = io.StringIO(), tmp_path / "small"
        report = run(dense, out, said)
        assert report.files == (out,)
        names = {path.name for path in out.iterdir()}
        assert {"packed.safetensors", "config.json", "manifest.json", "report.json", "LICENSE",
                "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names  # fmt: skip
        assert not names & {"notes.txt", "model.safetensors"}
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        estimate, blocks = said.getvalue().splitlines()
        assert estimate.startswith("tiny by llm_int8 takes about ")
        assert "of memory and " in estimate
        assert blocks.startswith("blocks 3/3")
        assert "tiny" not in compress.next_step(report)
        assert f"axicon serve {out}" in compress.next_step(report)

    def test_the_manifest_says_where_it_comes_from(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
        assert manifest["format_version"] == 1
        assert (manifest["kind"], manifest["name"]) == ("model", "small")
        [link], [parent] = manifest["chain"], manifest["parents"]
        assert link["method"] == "llm_int8"
        assert link["settings"] == {"threshold": 6.0, "relative": 5.0, "head": True, "skip": []}
        assert parent == {"name": "tiny", "sha256": checkpoint.digest(dense), "source": str(dense)}
        assert manifest["machine"]["threads"] == manifest["recipe"]["threads"] == 1
        assert manifest["versions"].keys() == {"axicon", "torch", "transformers", "python"}
        assert "out" not in manifest["recipe"]
        assert manifest["files"].keys() == {p.name for p in (tmp_path / "small").iterdir()} - {
            "manifest.json",
            *MEASURED,
        }

    def test_the_report_has_a_reason_for_what_is_not_there(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        report = json.loads((tmp_path / "small" / "report.json").read_text())
        assert report.keys() == {"bytes", "perplexity", "tokens_per_s"}
        parts = report["bytes"]
        weights = tmp_path / "small" / "packed.safetensors"
        assert parts["total"] == weights.stat().st_size
        assert parts["embedding"] + parts["blocks"] + parts["head"] == weights.stat().st_size - (64 << 10)
        assert parts["embedding"] == 272 * 96 * 2
        assert report["perplexity"]["compressed"] is report["perplexity"]["dense"] is None
        assert "no text was given" in report["perplexity"]["reason"]["compressed"]
        assert (
            report["tokens_per_s"] | {"reason": {"1": "measure=false", "8": "measure=false"}}
            == (report["tokens_per_s"])
        )

    def test_figures_when_they_are_asked_for(
        self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(speed.rates, "__kwdefaults__", speed.rates.__kwdefaults__ | {"new_tokens": 8})
        asked = {"text": str(prose(tmp_path)), "window": 64, "windows": 2}
        report = run(dense, tmp_path / "small", measure=True, **asked)
        found = json.loads((tmp_path / "small" / "report.json").read_text())
        for kind, path in (("dense", dense), ("compressed", tmp_path / "small")):
            again = evaluate.run(
                EvaluateRecipe(model=str(path), dtype="bfloat16", out=tmp_path / kind, threads=1, **asked),
                Reporter(io.StringIO()),
            )
            assert found["perplexity"][kind] == again.metrics["perplexity"]
        assert found["perplexity"]["windows"] == 2
        assert found["tokens_per_s"]["1"] > 0
        assert report.metrics["tokens_per_s/8"] == found["tokens_per_s"]["8"]
        assert report.metrics["dense/tokens_per_s/8"] > 0
        assert 0 < report.metrics["agreement/prefix"] <= 1
        assert 0 <= report.metrics["agreement/equal"] <= report.metrics["agreement/prefix"]
        for kind in ("", "dense/"):
            assert report.metrics[f"{kind}outliers/max_inf_norm"] > 0
            assert report.metrics[f"{kind}outliers/kurtosis"] > 1

    def test_a_figure_that_cannot_be_measured_leaves_the_model(self, dense: Path, tmp_path: Path) -> None:
        short = tmp_path / "short"
        shutil.copytree(dense, short)
        config = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
        report = run(short, tmp_path / "small", measure=True)
        row = report.details["figures"]["tokens_per_s/1"]
        assert row["compressed"] is None
        assert "100" in row["reason"]["compressed"]
        checkpoint.check(tmp_path / "small")

    def test_equal_recipes_make_equal_bytes(self, dense: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            run(dense, tmp_path / name)
        assert checkpoint.digest(tmp_path / "a") == checkpoint.digest(tmp_path / "b")
        first, second = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("a", "b"))
        assert first["files"] == second["files"]
        assert first | {"name": ""} == second | {"name": ""}
        run(dense, tmp_path / "c", compressor=INT8 | {"relative": 4.0})
        assert checkpoint.digest(tmp_path / "c") != checkpoint.digest(tmp_path / "a")

    def test_one_block_at_a_time_is_in_memory(
        self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: list[weakref.ref[Decoder]] = []
        load = checkpoint.load

        def watched(*args: Any, **options: Any) -> Decoder:
            assert [ref for ref in alive if ref() is not None] == []
            part = load(*args, **options)
            assert len(part.blocks) == 1
            alive.append(weakref.ref(part))
            return part

        monkeypatch.setattr(directory.checkpoint, "load", watched)
        (tmp_path / "small").mkdir()
        directory.write_compressed(LLMInt8(), dense, tmp_path / "small", dtype=torch.bfloat16)
        assert len(alive) == 3

    def test_threads_are_those_of_the_recipe(self, dense: Path, tmp_path: Path) -> None:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            run(dense, tmp_path / "small")
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)


class TestUse:
    def test_greedy_text_is_that_of_the_model_compressed_at_load(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        method = LLMInt8(relative=5.0)
        kernels = ["torch"] if native.why_unavailable() else ["torch", "native"]
        prompts = ["Once upon a time", "12 + 30 =", "a"]
        for path in kernels:
            engines = (
                build_engine(str(dense), threads=1, kv_gib=0.01, kernels=path, transform=Compress(method)),
                build_engine(str(tmp_path / "small"), threads=1, kv_gib=0.01, kernels=path),
            )  # fmt: skip
            params = {"max_tokens": 40, "temperature": 0, "logprobs": 3, "ignore_eos": True}
            want, got = (LocalModel(engine).generate(prompts, **params) for engine in engines)
            assert [one.tokens for one in got] == [one.tokens for one in want]
            assert [one.logprobs for one in got] == [one.logprobs for one in want]
            assert len(set(got[0].tokens)) > 5
            formats = [engine.runner.describe()["format"] for engine in engines]
            assert formats[0] == formats[1] == ["int8"]

    def test_what_is_packed_is_served_and_measured_as_it_is(
        self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from services.generation import engine_thread

        monkeypatch.setattr(native, "why_unavailable", lambda: None)  # where auto would compress
        small = str(tmp_path / "small")
        run(dense, tmp_path / "small")
        for dtype in ("bfloat16", "float32"):
            assert ServeRecipe(model=small, dtype=dtype).build_compressor(("int8",)) is None
        monkeypatch.undo()
        monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "cache"))
        thread = engine_thread(ServeRecipe(model=small, threads=1, kv_gib=0.01))
        thread.start()
        try:
            assert thread.engine.runner.describe()["format"] == ["int8"]
            assert thread.engine.model_name == "small"
        finally:
            thread.close()
        looked = prepare.look(LocalServeRecipe(model=small, threads=1))
        assert looked["served_name"] == "small"

    @pytest.mark.parametrize("use", ["serve", "evaluate", "compress"])
    def test_to_compress_it_once_more_is_refused_in_a_sentence(
        self, use: str, dense: Path, tmp_path: Path
    ) -> None:
        small = str(tmp_path / "small")
        run(dense, tmp_path / "small")
        actions: dict[str, Callable[[], object]] = {
            "serve": lambda: prepare.look(LocalServeRecipe(model=small, compressor="llm_int8")),
            "evaluate": lambda: evaluate.Subject(EvaluateRecipe(model=small, compressor="llm_int8")),
            "compress": lambda: run(Path(small), tmp_path / "smaller"),
        }
        with pytest.raises(AxiconError, match=r"compressed already \(int8\); .* the dense model") as caught:
            actions[use]()
        assert "\n" not in str(caught.value)


class TestWhatIsThereAlready:
    def test_the_same_recipe_is_done(self, dense: Path, tmp_path: Path) -> None:
        first = run(dense, tmp_path / "small")
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()}
        said = io.StringIO()
        again = run(dense, tmp_path / "small", said, threads=2, measure=True)
        assert "is there already, made by this recipe, and intact" in said.getvalue()
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()} == before
        assert again.metrics == first.metrics
        assert again.details["done"]

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"compressor": INT8 | {"relative": 4.0}}, r"made by llm_int8 with relative=5\.0"),
            ({"dtype": "float32"}, "dtype bfloat16, not float32"),
        ],
    )
    def test_another_recipe_is_refused(
        self, settings: dict[str, Any], says: str, dense: Path, tmp_path: Path
    ) -> None:
        run(dense, tmp_path / "small")
        with pytest.raises(AxiconError, match=rf"holds another model \({says}\); choose another"):
            run(dense, tmp_path / "small", **settings)

    def test_another_model_is_refused(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        other = tmp_path / "other"
        shutil.copytree(dense, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        with pytest.raises(AxiconError, match=rf"made from {dense}, or from another version of it"):
            run(other, tmp_path / "small")

    def test_what_was_not_made_here_is_refused(self, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "notes").mkdir()
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "notes", tmp_path / "file", dense):
            with pytest.raises(AxiconError, match="exists already; choose another directory or remove it"):
                run(dense, out)

    def test_damage_is_not_called_done(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        (tmp_path / "small" / "tokenizer.json").write_text("{}")
        with pytest.raises(RunFailed, match=r"is damaged now \(tokenizer.json has 2 bytes.*remove it"):
            run(dense, tmp_path / "small")


class TestRefusals:
    def test_too_little_memory(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("axicon.compress.estimate.available_memory", lambda: 100_000)
        with pytest.raises(AxiconError, match=r"about 0\.03 GiB of memory, 0\.00 GiB are available; stop"):
            run(dense, tmp_path / "small")
        assert not (tmp_path / "small").exists()

    def test_too_little_disk(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type(shutil.disk_usage(tmp_path))(1 << 30, 1 << 30, 1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        with pytest.raises(AxiconError, match=r"takes about 0\.03 GiB, 0\.00 GiB are free on that disk; "):
            run(dense, tmp_path / "deep" / "small")
        assert not (tmp_path / "deep" / "small").exists()

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"compressor": "gptq4"}, "compressor=gptq4: known are .*llm_int8"),
            ({"compressor": "auto"}, "compressor=auto: known are .*llm_int8"),
            ({"compressor": INT8 | {"treshold": 1}}, "did you mean 'threshold'"),
            ({"model": "./none"}, "no such file or directory"),
            ({"text": "none.txt"}, "none.txt"),
            ({"window": 300}, "window=300: the model knows 256 positions; give window=256"),
            ({"window": 200, "windows": 10**6}, "not 1000000: ask for windows=4"),
        ],
    )
    def test_what_is_wrong_shows_before_the_work(
        self,
        settings: dict[str, Any],
        says: str,
        dense: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(compress, "estimate", lambda *_: pytest.fail("the work began"))
        with pytest.raises(AxiconError, match=says):
            run(dense, tmp_path / "small", **{"text": str(prose(tmp_path)), **settings})

    def test_two_jobs_into_one_directory(self, dense: Path, tmp_path: Path) -> None:
        with claim(tmp_path / "small"):
            start = time.monotonic()
            with pytest.raises(AxiconError, match=rf"another axicon \(process {os.getpid()}\) is making it"):
                run(dense, tmp_path / "small")
            assert time.monotonic() - start < 5
        run(dense, tmp_path / "small")


class TestFailures:
    def test_whatever_fails_there_is_a_whole_model_or_none_and_a_rerun_completes(
        self, dense: Path, tmp_path: Path
    ) -> None:
        run(dense, tmp_path / "want")
        want = json.loads((tmp_path / "want" / "manifest.json").read_text())["files"]
        target, lines = tmp_path / "out" / "small", []
        for failed in failures(lambda: run(dense, target)):
            assert isinstance(failed, AxiconError), failed
            assert "\n" not in str(failed)
            lines.append(str(failed))
            if target.exists():
                run(dense, target)  # intact and called done, or this raises
                shutil.rmtree(target)
            assert list(target.parent.iterdir() if target.parent.exists() else ()) == []
        assert len(lines) > 40
        assert sum("No space left on device" in line for line in lines) > 20
        assert json.loads((target / "manifest.json").read_text())["files"] == want

    def test_killed_or_stopped_anywhere(self, dense: Path, tmp_path: Path) -> None:
        """In processes forked by one that has loaded torch and computed nothing."""
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_kill_at_some_points, args=(dense, tmp_path))
        process.start()
        process.join()
        assert process.exitcode == 0


def _kill_at_some_points(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "small"
    for number in (1, 2, 5, 30, 60, 70):
        assert _forked(lambda n=number: _die_at(n, dense, target)) == -signal.SIGKILL, number
        # A process that is killed cannot clean up: what is left is hidden, and unlocked.
        assert not target.exists()
    assert _forked(lambda: _stop_in_the_middle(dense, target)) == 143
    assert not target.exists()
    assert _forked(lambda: run(dense, target)) == 0
    assert [path.name for path in target.parent.iterdir()] == ["small"]


def _forked(action: Callable[[], object]) -> int:
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def _die_at(number: int, dense: Path, target: Path) -> None:
    with failing(number, kill=True):
        run(dense, target)


def _stop_in_the_middle(dense: Path, target: Path) -> None:
    def stopping(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    compress.write_manifest = stopping  # type: ignore[assignment]
    try:
        with stop.stop_on_signal():
            run(dense, target)
    except stop.Stopped as stopped:
        assert list(target.parent.iterdir()) == []
        os._exit(stopped.exit_code)


class TestCommand:
    def shown(self, *words: str) -> dict[str, Any]:
        output = CliRunner().invoke(command.axicon, ["compress", *words, "--show"], catch_exceptions=False)
        return dict(yaml.safe_load(output.output))

    def test_a_method_stands_for_the_recipe_that_comes_with_axicon(self) -> None:
        assert self.shown("llm_int8") == self.shown("llm_int8.yaml") == self.shown("recipes/llm_int8.yaml")
        same = CompressRecipe(**self.shown("llm_int8")).compressor, SERVED_BY_DEFAULT
        made = [method.build(COMPRESSORS, "compressor") for method in same]
        assert made[0] == made[1]

    def test_settings_are_laid_over_it(self) -> None:
        recipe = self.shown("llm_int8", "model=x", "compressor.relative=3", "out=a/b")
        assert recipe["compressor"] == {"method": "llm_int8", "threshold": 6.0, "relative": "3"}
        assert (recipe["model"], recipe["out"]) == ("x", "a/b")

    def test_a_file_that_lies_here_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.shown("llm_int8.yaml")["model"] == "demo"
        (tmp_path / "llm_int8.yaml").write_text("model: mine\n")
        assert self.shown("llm_int8.yaml")["model"] == "mine"

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ((), "name a method first: axicon compress "),
            (("llm_int",), "'llm_int' is no compression method: did you mean 'llm_int8'; a model is named"),
            (("demo",), "; a model is named with model=demo"),
            (("other/llm_int8.yaml",), "cannot be read"),
            (("llm_int8", "compressor=none"), "compressor"),
            (("llm_int8", "outt=x"), "did you mean 'out'"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            command.main(["compress", *words])
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert says in said
        assert said.count("\n") == 1

    def test_the_command_itself(
        self, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["llm_int8", f"model={dense}", f"out={tmp_path / 'small'}", "measure=false", "threads=1"]
        command.main(["compress", *words])
        said = capsys.readouterr()
        assert f"serve it: axicon serve {tmp_path / 'small'}" in said.out
        assert "weights" in said.out


def test_estimates_grow_with_the_model(dense: Path) -> None:
    from axicon.compress.estimate import estimate

    need = estimate(LLMInt8(), dense, torch.bfloat16)
    whole = sum(p.numel() for p in checkpoint.load(dense).parameters())
    assert need.memory >= 272 * 96 * 16
    # int8 blocks and head, an embedding of bfloat16: 1.5 bytes a weight, give or take the norms.
    assert 1.2 * whole < need.disk - (32 << 20) < 2 * whole
    assert machine.available_memory() is None or need.memory < 10**8
    assert need.seconds > need.block_seconds
