"""`axicon compare` on directories and results files made for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from axicon.errors import AxiconError
from axicon.model import checkpoint
from jobs import __main__ as command
from jobs import compare, compare_show
from jobs.compare import BITS, PERPLEXITY, WEIGHTS, Column, CompareRecipe, Comparison, Figure
from jobs.model_report import Bytes, ModelReport, PerplexityFigures, Speed
from tests.jobs.made import made_from, model_files

INT8 = {"method": "llm_int8", "settings": {"threshold": 6.0, "relative": 5.0, "head": True, "skip": []}}
ONE, EIGHT = "tokens/s, 1 stream", "tokens/s, 8 streams"
TEXT = {"protocol": "gptq, window 512, float32", "windows": 2, "text_sha256": "a" * 64}
HERE = "a processor, 2 threads"


@pytest.fixture(autouse=True)
def _here(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dense() -> Path:
    folder = made_from(Path("dense"))
    report(folder, dense=20.0, speed=(50.0, 200.0))
    return folder


@pytest.fixture
def packed(dense: Path) -> Path:
    folder = made_from(Path("packed"), chain=[INT8], value=1.0)
    report(folder, dense=20.0, compressed=21.0, speed=(100.0, 300.0))
    return folder


def report(
    folder: Path,
    speed: tuple[float, float] | None = None,
    conditions: str = HERE,
    **perplexity: Any,
) -> None:
    ModelReport(
        bytes=Bytes(total=1, dense_total=1),
        perplexity=PerplexityFigures(**TEXT | perplexity),
        tokens_per_s=Speed(one=speed[0], eight=speed[1], conditions=conditions) if speed else Speed(),
    ).write(folder)


def results(path: str, **change: Any) -> str:
    """A results file of `axicon evaluate`, with perplexity and one task."""
    perplexity = {"value": 22.0, "protocol": "gptq", "window": 512, "windows": 2, "text_sha256": "a" * 64}
    content: dict[str, Any] = {
        "model_name": "measured",
        "results": {"sst2": {"acc,none": 0.75, "acc_stderr,none": 0.01}},
        "n-samples": {"sst2": {"original": 9, "effective": 8}},
        "n-shot": {"sst2": 0},
        "task_hashes": {"sst2": "b" * 64},
        "axicon": {
            "recipe": {"dtype": "float32", "compressor": INT8["settings"] | {"method": "llm_int8"}},
            "perplexity": perplexity,
        },
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content | change))
    return path


def compared(*models: object) -> Comparison:
    return compare.run(CompareRecipe(model=tuple(map(str, models)), plot=None))


def shown(*words: object) -> str:
    return CliRunner().invoke(command.axicon, ["compare", *map(str, words)], catch_exceptions=False).output


def test_every_figure_stands_beside_the_first(dense: Path, packed: Path) -> None:
    found = compared(dense, packed)
    values = {row: [cell.figure.value for cell in cells] for row, cells in found.rows.items()}
    size = (dense / "model.safetensors").stat().st_size
    assert values[WEIGHTS] == [size, size]
    parameters = 32 * 8 * 2 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8  # embedding and head, attention, MLP, norms
    assert values[BITS][0] == pytest.approx(8 * size / parameters)
    assert values[PERPLEXITY] == [20.0, 21.0]
    assert (values[ONE], values[EIGHT]) == ([50.0, 100.0], [200.0, 300.0])
    percent = {row: cells[1].percent for row, cells in found.rows.items()}
    assert percent == {
        WEIGHTS: 0.0,
        BITS: 0.0,
        PERPLEXITY: pytest.approx(5.0),
        ONE: pytest.approx(100.0),
        EIGHT: pytest.approx(50.0),
    }
    text = shown(dense, packed, "plot=none")
    assert "21.000 (+5.0 %)" in text
    assert "llm_int8 relative=5.0" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_sha256": "c" * 64}, "another text"),
        ({"windows": 20}, "windows 20 instead of 2"),
        (
            {"protocol": "gptq, window 512, bfloat16"},
            "window 512, bfloat16 instead of gptq, window 512, float32",
        ),
    ],
)
def test_perplexity_measured_otherwise_is_not_compared(
    dense: Path, packed: Path, change: dict[str, Any], says: str
) -> None:
    report(packed, **{"compressed": 21.0} | change)
    cell = compared(dense, packed).rows[PERPLEXITY][1]
    assert (cell.comparable, cell.percent) == (False, None)
    text = shown(dense, packed, "plot=none")
    assert "packed, perplexity 21.000, not comparable: " in text
    assert says in text
    assert "axicon evaluate packed text=FILE windows=2 window=512 dtype=float32" in text
    assert "21.000 (+" not in text


def test_speed_of_another_machine_is_not_compared(dense: Path, packed: Path) -> None:
    report(packed, compressed=21.0, speed=(400.0, 900.0), conditions="another processor, 64 threads")
    assert not compared(dense, packed).rows[ONE][1].comparable
    assert "other conditions" in shown(dense, packed, "plot=none")


def test_what_is_missing_says_why_and_how_to_get_it(dense: Path) -> None:
    bare = model_files(Path("bare"))
    reason = {"1": "it is too short", "8": "it is too short"}
    ModelReport(tokens_per_s=Speed(reason=reason)).write(dense)
    text = shown(dense, bare, "plot=none")
    assert "dense, it is too short: axicon evaluate dense speed=true" in text
    assert "bare, not measured: axicon evaluate bare text=FILE" in text
    assert "not recorded" in text


def test_tasks_compare_over_the_same_questions_only() -> None:
    other = {"results": {"sst2": {"acc,none": 0.6}}}
    same = compared(results("a.json"), results("b.json", **other)).rows["sst2 acc"]
    assert same[1].percent == pytest.approx(-20.0)
    found = compared(results("a.json"), results("b.json", **other, task_hashes={"sst2": "c" * 64}))
    assert not found.rows["sst2 acc"][1].comparable
    assert [column.name for column in found.columns] == ["a.json", "b.json"]


def test_a_directory_takes_what_was_measured_of_the_same_weights(dense: Path, packed: Path) -> None:
    ours = {"recipe": {"dtype": "float32", "compressor": None}, "model_sha256": checkpoint.digest(dense)}
    results("artifacts/evaluate/dense/results_2.json", axicon=ours)
    results("artifacts/evaluate/packed/results_2.json", axicon=ours)  # of other weights than these
    Path("artifacts/evaluate/packed/results_3.json").write_text("[]")
    cells = compared(dense, packed).rows["sst2 acc"]
    assert [cell.figure.value for cell in cells] == [0.75, None]
    assert cells[1].figure.command == "axicon evaluate packed tasks=sst2 data=DIR"


def test_a_results_file_beside_a_directory(dense: Path) -> None:
    found = compared(dense, results("r.json"))
    assert found.rows[PERPLEXITY][1].percent == pytest.approx(10.0)
    assert found.columns[1].methods == "loaded with llm_int8 relative=5.0"
    assert "a results file does not hold it" in found.rows[WEIGHTS][1].figure.why


def test_json_holds_the_same(dense: Path, packed: Path) -> None:
    content = json.loads(shown(dense, packed, "plot=none", "--json"))
    assert content["picture"] is None
    assert [model["name"] for model in content["models"]] == ["dense", "packed"]
    cell = content["figures"][PERPLEXITY][1]
    assert (cell["value"], cell["comparable"], round(cell["change_percent"], 6)) == (21.0, True, 5.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dense"], "two models or more"),
        (["dense", "none"], "none: neither a model directory nor a results_"),
        (["dense", "newer"], "format version 2, this axicon reads 1; update axicon"),
        (["dense", "broken"], "report.json: perplexity.dense: .* remove the file and measure again"),
        (["a.json", "text.json"], "have no figure that may be compared"),
        (["a.json", "other.json"], "it has no key `results`"),
        (["dense", "packed", "plot=x.gif"], "plot=x.gif: the picture is .svg or .png"),
        (["dense", "packed", "plt=x.svg"], "did you mean 'plot'"),
    ],
)
def test_bad_input_is_one_line(dense: Path, packed: Path, words: list[str], says: str) -> None:
    (model_files(Path("newer")) / "manifest.json").write_text('{"format_version": 2}')
    (made_from(Path("broken")) / "report.json").write_text('{"perplexity": {"dense": "low"}}')
    results("a.json", axicon=None)
    results("text.json", results={})
    Path("other.json").write_text("{}")
    with pytest.raises(AxiconError, match=says) as caught:
        shown(*words)
    assert "\n" not in str(caught.value)


def picture() -> Comparison:
    """Five models, two pairs of which nearly coincide."""
    known = [
        ("first", 269, 15.75),
        ("near", 140, 15.91),
        ("nearer", 141, 15.9),
        ("small", 82, 16.6),
        ("too", 82, 16.6),
    ]
    columns = [
        Column(
            name=f"{name} with a name of its own",
            typed=name,
            methods="",
            figures={
                WEIGHTS: Figure(value=1e6 * size),
                PERPLEXITY: Figure(value=ppl),
                ONE: Figure(value=size),
            },
        )
        for name, size, ppl in known
    ]
    return Comparison(
        columns,
        {row: compare._row([c.get(row) for c in columns]) for row in (WEIGHTS, PERPLEXITY, ONE, EIGHT)},
    )


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_picture_is_drawn_and_the_same_each_time(tmp_path: Path, suffix: str, magic: bytes) -> None:
    first, second = tmp_path / "new" / f"a{suffix}", tmp_path / "new" / f"b{suffix}"
    compare_show.draw(picture(), first)
    compare_show.draw(picture(), second)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()
    assert len(list(first.parent.iterdir())) == 2


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_names_do_not_lie_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.text import Annotation, Text

    drawn: list[Any] = []
    monkeypatch.setattr(compare_show, "_save", lambda figure, path: drawn.append(figure))
    compare_show.draw(picture(), tmp_path / "a.png")
    names = [one for one in drawn[0].axes[0].get_children() if isinstance(one, Annotation)]
    assert len(names) == 5
    boxes = [(one.get_window_extent(), Text.get_window_extent(one))[1] for one in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_matplotlib_a_sentence(dense: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no picture: matplotlib is not installed" in shown(dense, packed)
    assert not Path("artifacts").exists()
