"""`axicon compress` from a recipe to a directory: what is made, and what it does when it is used."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from axicon.compress import directory
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.walk import Compress
from axicon.errors import AxiconError
from axicon.evaluate import serving, speed
from axicon.generate.build import build_engine
from axicon.generate.local import LocalModel
from axicon.kernels import native
from axicon.model import checkpoint, machine
from axicon.model.artefact import MEASURED
from axicon.model.decoder import Decoder
from axicon.recipe import EvaluateRecipe, LocalServeRecipe, ServeRecipe
from jobs import compress, evaluate, prepare
from jobs.progress import Reporter
from tests.jobs.compressing import INT8, dense_model, prose, run


@pytest.fixture(autouse=True)
def _here(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another process takes seconds to start; tests/evaluate has one.
    monkeypatch.setattr(serving, "measure", serving.measure_here)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths the C++ kernels take, with a tied head and a tokenizer."""
    native.why_unavailable()  # compiled here once, and not again in the caches of the tests
    folder = tmp_path_factory.mktemp("models") / "tiny"
    dense_model(folder)
    (folder / "notes.txt").write_text("not the model")
    (folder / "LICENSE").write_text("free")
    return folder


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
        self, dense: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from services.generation import engine_thread

        monkeypatch.setattr(native, "why_unavailable", lambda: None)  # where auto would compress
        small = str(tmp_path / "small")
        run(dense, tmp_path / "small")
        for dtype in ("bfloat16", "float32"):
            assert ServeRecipe(model=small, dtype=dtype).build_compressor(("int8",)) is None
        monkeypatch.undo()
        monkeypatch.setenv("AXICON_CACHE", str(own_cache))
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


def test_estimates_grow_with_the_model(dense: Path) -> None:
    from axicon.compress.estimate import estimate

    need = estimate(LLMInt8(), dense, torch.bfloat16)
    whole = sum(p.numel() for p in checkpoint.load(dense).parameters())
    assert need.memory >= 272 * 96 * 16
    # int8 blocks and head, an embedding of bfloat16: 1.5 bytes a weight, give or take the norms.
    assert 1.2 * whole < need.disk - (32 << 20) < 2 * whole
    assert machine.available_memory() is None or need.memory < 10**8
    assert need.seconds > need.block_seconds
