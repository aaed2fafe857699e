"""`report.json`: every null has a reason, and figures of different texts never share a block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.evaluate import Perplexity
from jobs.model_report import Bytes, ModelReport, PerplexityFigures, Speed


def measured(value: float, text: str = "a") -> Perplexity:
    return Perplexity(value=value, nll=1.0, windows=2, window=16, tokens=40, text_sha256=text)


def test_a_directory_without_a_report_has_nulls_with_reasons(tmp_path: Path) -> None:
    empty = ModelReport.read(tmp_path)
    empty.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    nothing = "not measured"
    assert content == {
        "bytes": {
            "total": None,
            "dense_total": None,
            "reason": {"total": nothing, "dense_total": nothing},
        },
        "perplexity": {
            "dense": None,
            "compressed": None,
            "protocol": None,
            "windows": None,
            "text_sha256": None,
            "reason": {"dense": nothing, "compressed": nothing},
        },
        "tokens_per_s": {
            "1": None,
            "8": None,
            "conditions": None,
            "reason": {"1": nothing, "8": nothing},
        },
    }
    assert ModelReport.read(tmp_path) == empty


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    report = ModelReport().updated(
        bytes=Bytes.model_validate({"total": 5, "dense_total": 9, "embedding": 2}),
        perplexity=PerplexityFigures.of(measured(20.0), "float32", "dense"),
        tokens_per_s=Speed(one=3.5, reason={"8": "too little memory"}),
    )
    report.write(tmp_path)
    again = ModelReport.read(tmp_path)
    assert again == report
    assert again.bytes.model_extra == {"embedding": 2}
    assert (again.tokens_per_s.get("1"), again.tokens_per_s.why("8")) == (3.5, "too little memory")
    assert "reason" not in json.loads((tmp_path / "report.json").read_text())["bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_figures_join_on_one_text_and_replace_on_another() -> None:
    dense = PerplexityFigures.of(measured(20.0), "float32", "dense")
    packed = PerplexityFigures.of(measured(21.0), "float32", "compressed")
    both = ModelReport(perplexity=dense).updated(perplexity=packed).perplexity
    assert (both.dense, both.compressed, both.reason) == (20.0, 21.0, {})
    for other in (measured(22.0, "b"), measured(22.0)):
        dtype = "float32" if other.text_sha256 == "b" else "bfloat16"
        new = PerplexityFigures.of(other, dtype, "compressed")
        replaced = ModelReport(perplexity=both).updated(perplexity=new).perplexity
        assert (replaced.dense, replaced.compressed) == (None, 22.0)


@pytest.mark.parametrize(
    "content",
    [{"bytes": {"total": "many"}}, {"tokens_per_s": {"1": -1}}, {"perplexity": 3}, {"bytes": {"reason": 7}}],
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(AxiconError, match=r"report\.json: .*remove the file and measure again") as caught:
        ModelReport.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_reason_may_be_one_sentence_for_all() -> None:
    speed = Speed.model_validate({"1": None, "8": None, "reason": "no time"})
    assert speed.reason == {"1": "no time", "8": "no time"}
