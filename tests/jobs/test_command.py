"""The `axicon` command: help, recipes, and the line and exit code a mistake gets. Starts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from axicon import __version__
from axicon.errors import AxiconError, RunFailed
from axicon.recipe import EvaluateRecipe, LocalServeRecipe
from axicon.settings import fields
from jobs import __main__ as command
from jobs.finetune_recipe import FinetuneRecipe


def shown(*words: str) -> str:
    return CliRunner().invoke(command.axicon, list(words), catch_exceptions=False).output


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code, and what went to standard error."""
    with pytest.raises(SystemExit) as caught:
        command.main(list(words))
    return int(caught.value.code or 0), capsys.readouterr().err


def test_help_names_every_verb_and_a_first_step() -> None:
    text = shown("--help")
    assert "axicon serve demo" in text
    for verb in command.axicon.commands:
        assert f"\n  {verb}" in text


@pytest.mark.parametrize(
    ("verb", "recipe"),
    [("serve", LocalServeRecipe), ("evaluate", EvaluateRecipe), ("finetune", FinetuneRecipe)],
)
def test_help_of_a_verb_lists_every_setting(verb: str, recipe: type) -> None:
    text = shown(verb, "--help")
    missing = [key for key, _ in fields(recipe) if key != "model" and f"  {key}=" not in text]
    assert not missing
    assert "Examples:" in text
    assert "name of the method" not in text


def test_version() -> None:
    assert shown("version").strip() == shown("--version").strip() == __version__


def test_show_prints_the_resolved_recipe() -> None:
    recipe = yaml.safe_load(shown("serve", "demo", "port=8001", "limits.n=2", "--show"))
    assert (recipe["model"], recipe["port"], recipe["limits"]["n"]) == ("demo", 8001, 2)
    assert LocalServeRecipe.model_validate(recipe).max_rows == LocalServeRecipe().max_rows


def test_the_model_may_be_left_out_or_named_as_a_setting() -> None:
    assert yaml.safe_load(shown("serve", "port=8001", "--show"))["model"] == "demo"
    assert yaml.safe_load(shown("serve", "model=x", "--show"))["model"] == "x"


def test_a_recipe_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: x\nport: 8002\nlimits: {n: 3, stops: 2}\n")
    recipe = yaml.safe_load(shown("serve", str(path), "limits.n=4", "--show"))
    assert (recipe["model"], recipe["port"], recipe["limits"]["n"], recipe["limits"]["stops"]) == (
        "x",
        8002,
        4,
        2,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve", "demo", "prot=1"), "unknown key 'prot': did you mean 'port'?"),
        (("serve", "demo", "port=0"), "port=0: must be greater than or equal to 1"),
        (("serve", "demo", "8001"), "cannot read '8001': settings are given as key=value"),
        (("evaluate", "demo", "windws=1"), "did you mean 'windows'?"),
        (("evaluate", "demo"), "nothing to measure"),
        (("serve", "none.yaml"), "none.yaml: cannot be read (No such file or directory)"),
        (("srve",), "No such command 'srve'"),
        (("serve", "--shw"), "No such option '--shw'. Did you mean '--show'? (axicon serve --help)"),
        (("render", "kuberay", "--x"), "(axicon render kuberay --help)"),
        (("submit", "--x", "verify"), "No such option '--x'. (axicon submit --help)"),
        (("serve", "demo", "host=0.0.0.0"), "no API keys are configured"),
        (("serve", "demo", "api_keys_env=AXICON_NO_SUCH"), "this environment variable holds no key"),
        (("serve", "demo", "cluster=none.yaml"), "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, text = run(capsys, *words)
    assert code == 2
    assert says in text
    assert text.startswith("axicon: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("render",)])
def test_a_group_without_a_verb_lists_its_verbs_in_whole_sentences(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, text = run(capsys, *words)
    assert code == 2
    assert text.startswith("Usage: ")
    assert "Commands:\n" in text
    assert "..." not in text.partition("Commands:\n")[2]


def test_help_has_a_method_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["serve", "--help"])
    assert "compressor=auto " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a: [", "just text", "1: 2"])
def test_a_broken_recipe_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, said = run(capsys, "serve", str(path))
    assert code == 2
    assert str(path) in said
    assert said.count("\n") == 1


def test_a_failure_while_running_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: object, show: object) -> None:
        raise RunFailed("Ray has ended")

    monkeypatch.setattr(command.axicon.commands["serve"], "callback", fail)
    assert run(capsys, "serve") == (1, "axicon: Ray has ended\n")


def test_tracebacks_are_kept_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_DEBUG", "1")
    with pytest.raises(AxiconError, match="did you mean 'port'"):
        command.main(["serve", "demo", "prot=1"])
