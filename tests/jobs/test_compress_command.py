"""The words of `axicon compress`: methods, recipes that come with axicon, settings, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from axicon.compress import COMPRESSORS
from axicon.recipe import SERVED_BY_DEFAULT, CompressRecipe
from jobs import __main__ as command
from tests.jobs.compressing import dense_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("models") / "tiny")


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
