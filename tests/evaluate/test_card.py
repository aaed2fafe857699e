"""Rows of a card, what is judged of them, and the measurements that only a card has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axicon.errors import AxiconError
from axicon.evaluate import agreement, outliers, serving
from axicon.evaluate.card import NOT_MEASURED, Row, expected, in_order, is_worse, judgement
from axicon.evaluate.speed import TooShort, first_token
from axicon.generate.build import build_engine
from axicon.model import checkpoint


class TestRow:
    def test_every_null_has_a_reason_and_nothing_else_has(self) -> None:
        row = Row.model_validate({"dense": 2.0, "reason": {"dense": "x", "compressed": "too short"}})
        assert row.reason == {"compressed": "too short"}
        assert Row().reason == {"dense": NOT_MEASURED, "compressed": NOT_MEASURED}

    def test_what_rests_on_the_same_stands_side_by_side(self) -> None:
        row = Row().with_value("dense", 2.0, {"text": "a"}, stderr=0.5)
        both = row.with_value("compressed", 3.0, {"text": "a"}, better="lower")
        assert (both.dense, both.compressed, both.ratio, both.reason) == (2.0, 3.0, 1.5, {})
        assert (both.stderr, both.better) == ({"dense": 0.5}, "lower")

    def test_what_rests_on_something_else_takes_its_place(self) -> None:
        row = Row().with_value("dense", 2.0, {"text": "a"}).with_value("compressed", 3.0, {"text": "b"})
        assert (row.dense, row.compressed, row.basis) == (None, 3.0, {"text": "b"})
        assert row.reason == {"dense": "measured in another way before"}

    def test_a_null_comes_with_its_command(self) -> None:
        assert Row().as_json("perplexity")["command"] == "axicon card DIR text=FILE"
        assert Row().as_json("rte/acc")["command"] == "axicon card DIR data=FOLDER"
        assert "command" not in Row(dense=1.0, compressed=2.0).as_json("perplexity")
        assert "command" not in Row(compressed=0.5).as_json("agreement/prefix")

    def test_further_metrics_stand_behind_their_task(self) -> None:
        rows = {"mine/acc": Row(), **expected(), "lambada/perplexity": Row()}
        names = list(in_order(rows))
        assert names.index("lambada/perplexity") == names.index("lambada/acc") + 1
        assert names.index("cb/acc") < names.index("mine/acc") < names.index("agreement/prefix")


def rows(**pairs: tuple[float, float]) -> dict[str, Row]:
    names = {"bytes": "bytes", "one": "tokens_per_s/1", "eight": "tokens_per_s/8", "ppl": "perplexity"}
    return {names[key]: Row(dense=dense, compressed=other) for key, (dense, other) in pairs.items()}


class TestJudgement:
    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({}, "Nothing was measured yet that the dense model could be compared by."),
            (
                {"bytes": (100, 120), "one": (10, 5), "eight": (10, 10.1), "ppl": (20, 21)},
                "It is larger, slower and worse than the dense model: nothing is gained, use the dense",
            ),
            (
                {"bytes": (100, 50), "one": (10, 5), "ppl": (20, 21)},
                "It is slower and worse than the dense model: only its size speaks for it.",
            ),
            (
                {"bytes": (100, 100), "one": (10, 20), "ppl": (20, 20)},
                "It is larger than the dense model: only its speed speaks for it.",
            ),
            ({"bytes": (100, 50), "ppl": (20, 40)}, "Much of the dense model's quality is lost."),
            ({"bytes": (100, 50), "one": (10, 5)}, "It is slower than the dense model. How much quality"),
        ],
    )
    def test_what_speaks_against_it_is_said(self, given: dict[str, tuple[float, float]], says: str) -> None:
        assert says in judgement(rows(**given))

    def test_where_nothing_does_the_figures_are_all(self) -> None:
        found = judgement(rows(bytes=(100, 50), one=(10, 20), eight=(10, 15), ppl=(20, 20.2)))
        assert found == (
            "It takes 50 % of the dense model's bytes, decodes at 2.00 times the dense speed with 1 stream "
            "and 1.50 times with 8 streams and has a perplexity 1.0 % higher."
        )

    def test_accuracy_within_its_error_is_no_loss(self) -> None:
        def task(dense: float, other: float) -> dict[str, Row]:
            return {"rte/acc": Row(dense=dense, compressed=other, stderr={"dense": 0.05, "compressed": 0.05})}

        assert is_worse(task(0.6, 0.5)) is False
        assert is_worse(task(0.6, 0.4)) is True
        assert is_worse({}) is None
        assert "an accuracy 20.0 points lower" in judgement(task(0.6, 0.4))
        assert "the same accuracy within its noise" in judgement(task(0.6, 0.5))


class TestAgreement:
    def test_tokens_before_the_first_difference(self) -> None:
        found = agreement.agreement([[1, 2, 3, 4], [5, 6], [7, 8]], [[1, 2, 9, 4], [5, 6], [7]])
        assert found == agreement.Agreement(prefix=(2 + 2 + 1) / 8, equal=1 / 3)

    def test_continuations_are_greedy_and_end_where_the_text_does(self, long_dir: Path) -> None:
        engine = build_engine(str(long_dir), dtype="float32", threads=1, kv_gib=0.05, max_rows=4, max_queue=2)
        found = agreement.continuations(engine, checkpoint.load_tokenizer(long_dir))
        assert len(found) == len(agreement.PROMPTS)
        decoder = checkpoint.load(long_dir, dtype=torch.float32)
        for prompt, text in found[::8]:
            assert 1 <= len(text) <= agreement.NEW_TOKENS
            best = decoder.logits(torch.tensor([[*prompt, *text]]))[0].argmax(-1)
            assert best[len(prompt) - 1 : -1].tolist() == text
            assert 1 not in text[:-1]  # the end of a text


class TestOutliers:
    def test_kurtosis_of_known_distributions(self) -> None:
        made = torch.Generator().manual_seed(0)
        normal = torch.randn(10**6, generator=made)
        assert outliers.kurtosis(normal) == pytest.approx(3.0, abs=0.05)
        assert outliers.kurtosis(torch.rand(10**6, generator=made)) == pytest.approx(1.8, abs=0.02)
        one = normal[: 10**4].clone()
        one[77] = 1000.0
        assert outliers.kurtosis(one) > 9000
        assert outliers.inf_norm(-one) == 1000.0

    def test_of_a_model_they_are_those_of_its_tensors(self, long_dir: Path) -> None:
        """Computed once more, sequence by sequence, from what the modules hand on."""
        decoder = checkpoint.load(long_dir, dtype=torch.float32)
        texts = [[3, 4, 5, 6, 7], [8, 9, 10]]
        found = outliers.outliers(decoder, texts)
        seen: dict[str, list[torch.Tensor]] = {}
        watched = [n for n, _ in decoder.named_modules() if n.endswith(("norm", ".out", ".down"))]
        watched += [f"blocks.{i}" for i in range(len(decoder.blocks))]
        hooks = [
            decoder.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out.flatten())
            )
            for name in watched
        ]
        with torch.no_grad():
            for text in texts:
                decoder.logits(torch.tensor([text]))
        for hook in hooks:
            hook.remove()
        assert {len(tensors) for tensors in seen.values()} == {2}
        largest = [sum(t.abs().max().item() for t in pair) / 2 for pair in seen.values()]
        tails = [sum(map(outliers.kurtosis, pair)) / 2 for pair in seen.values()]
        assert found.max_inf_norm == pytest.approx(max(largest), rel=1e-4)
        assert found.kurtosis == pytest.approx(sum(tails) / len(tails), rel=1e-3)
        assert not decoder.blocks[0]._forward_hooks


class TestServing:
    def test_what_the_other_process_says_comes_back(self, long_dir: Path) -> None:
        said: list[str] = []
        found = serving.measure(long_dir, threads=1, progress=lambda done, total, note: said.append(note))
        assert found.tokens_per_s.keys() == {"1", "8"}
        assert found.first_token_ms is not None
        assert found.peak_memory is not None
        assert 2**20 < found.peak_memory < 2**31
        assert len(found.continuations) == len(agreement.PROMPTS)
        assert found.reason == {}
        assert "1 thread, bfloat16" in found.conditions
        assert len(said) == 6

    def test_what_it_cannot_do_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(AxiconError) as caught:
            serving.measure(tmp_path, threads=1)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_short_model_has_reasons(self, model_dir: Path) -> None:
        found = serving.measure_here(model_dir, threads=1)
        assert found.tokens_per_s == {}
        assert found.first_token_ms is None
        assert found.reason.keys() == {"tokens_per_s", "first_token_ms", "continuations"}
        assert "room for 64" in found.reason["continuations"]

    def test_the_first_token_of_a_prompt(self, long_dir: Path) -> None:
        engine = build_engine(str(long_dir), threads=1, kv_gib=0.05)
        assert first_token(engine, prompt_tokens=8, rounds=2) > 0
        assert not engine.has_work
        with pytest.raises(TooShort, match="room for"):
            first_token(engine, prompt_tokens=10**6)
