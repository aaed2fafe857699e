from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.evaluate.tiny import PROSE, make_tokenizer, save_model


@pytest.fixture(scope="session")
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(add_bos=request.param)


@pytest.fixture(scope="session")
def model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions, as a directory."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def long_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for everything that a card measures."""
    folder = tmp_path_factory.mktemp("models") / "long"
    return save_model(folder, make_tokenizer(add_bos=False), positions=320)


@pytest.fixture
def few_lm_eval_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows one task of its own only: reading all of them takes seconds."""
    import lm_eval.tasks.manager as manager

    home = Path(manager.__file__).parent / "glue" / "sst2"
    shutil.copytree(home, tmp_path / "tasks" / "sst2")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
