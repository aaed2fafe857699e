"""Models by hub id, with the hub's own library replaced: what is asked of it and what is made of its
answers."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from axicon.errors import AxiconError
from axicon.model.checkpoint import load, model_id, resolve
from tests.parity.variants import saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A repository in a folder; `snapshot_download` links what is asked for into a cache like the hub's."""

    def __init__(self, root: Path) -> None:
        self.remote = root / "remote"
        self.snapshot = root / "hub" / "models--org--tiny" / "snapshots" / COMMIT
        self.calls: list[dict[str, Any]] = []
        self.offline = False

    def download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        self.calls.append(
            {"repo": repo_id, "revision": revision, "patterns": allow_patterns, "offline": local_files_only})
        if not local_files_only:
            self.snapshot.mkdir(parents=True, exist_ok=True)
            for file in self.remote.iterdir():
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, self.snapshot)
        elif not self.snapshot.exists():
            raise errors.LocalEntryNotFoundError("nothing here")
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    saved("llama_tied", hub.remote)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return hub


def test_a_model_is_fetched_by_its_commit_without_pickles_or_code(hub: Hub) -> None:
    for name in ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "README.md"):
        (hub.remote / name).write_text("never fetched")
    folder = resolve("org/tiny@main")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]
    assert [call["revision"] for call in hub.calls] == ["main", COMMIT]
    assert {call["repo"] for call in hub.calls} == {"org/tiny"}
    assert folder.name == COMMIT
    assert model_id(folder) == model_id("org/tiny@main") == "org/tiny"
    assert load(folder).shape.layers == 3


def test_offline_uses_only_what_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AxiconError, match="not in the hub's cache and offline mode is on"):
        resolve("org/tiny", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AxiconError, match="offline mode is on"):
        resolve("org/tiny")
    resolve("org/tiny", offline=False)
    hub.calls.clear()
    resolve("org/tiny")
    assert {call["offline"] for call in hub.calls} == {True}


def test_an_unknown_architecture_is_refused_before_weights_are_fetched(hub: Hub) -> None:
    (hub.remote / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(AxiconError, match=r"org/tiny: .*'gpt2'.*opt, llama, mistral, qwen2, qwen3"):
        resolve("org/tiny")
    assert [p.name for p in hub.snapshot.iterdir()] == ["config.json"]


def test_remote_code_is_refused_before_weights_are_fetched(hub: Hub) -> None:
    config = json.loads((hub.remote / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (hub.remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(AxiconError, match="auto_map"):
        resolve("org/tiny")
    assert len(hub.calls) == 1


def test_a_repository_with_pickles_only_is_refused(hub: Hub) -> None:
    (hub.remote / "model.safetensors").rename(hub.remote / "pytorch_model.bin")
    with pytest.raises(AxiconError, match=r"no safetensors in the repository.*save_pretrained"):
        resolve("org/tiny")


def test_a_repository_without_config_is_refused(hub: Hub) -> None:
    (hub.remote / "config.json").unlink()
    with pytest.raises(AxiconError, match=r"no config\.json in the repository"):
        resolve("org/tiny")


def _http_error(kind: type[Exception]) -> Exception:
    import httpx

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
    return kind("secret details", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: _http_error(errors.RepositoryNotFoundError), "no such public model"),
        (lambda: _http_error(errors.GatedRepoError), "accept its terms on the hub"),
        (lambda: _http_error(errors.RevisionNotFoundError), "no such revision"),
        (lambda: _http_error(errors.HfHubHTTPError), "go on where it stopped"),
        (lambda: OSError("disk full"), "disk full"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    error: Callable[[], Exception], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(AxiconError, match=f"^org/tiny: .*{message}"):
        resolve("org/tiny")
