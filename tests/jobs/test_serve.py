"""What `axicon serve` finds out before it starts anything, and how it ends."""

from __future__ import annotations

import http.server
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from axicon.recipe import LocalServeRecipe, ServeRecipe
from jobs import serve
from jobs.prepare import Preparation, look


def recipe(**values: object) -> LocalServeRecipe:
    return LocalServeRecipe.model_validate(values)


def test_a_gpu_that_is_not_there_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(AxiconError, match="device=cuda: torch finds no CUDA device here"):
        look(recipe(device="cuda"))


def test_on_a_gpu_auto_leaves_the_model_as_it_is() -> None:
    """The int8 that it means on a CPU finds its outliers there alone; who names it gets it."""
    assert recipe(device="cuda").build_compressor() is None
    assert recipe(device="cuda", compressor="llm_int8").build_compressor() is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none", "no such file or directory"),
        (lambda folder: _file(folder / "model.bin", b"\x80\x04"), "can run code"),
        (lambda folder: _file(folder / "model.gguf", b"not a gguf"), "GGUF"),
        (lambda folder: _file(folder / "pytorch_model.bin", b"\x80\x04").parent, "config.json"),
        (
            lambda folder: _model(folder, {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
            "model_type 'mamba'",
        ),
    ],
    ids=["missing", "pickle", "gguf", "no-config", "unknown-family"],
)
def test_a_model_that_cannot_be_served_is_one_line(tmp_path: Path, make: object, says: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(AxiconError) as caught:
        look(recipe(model=str(path)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _model(folder: Path, config: dict[str, object]) -> Path:
    import json

    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    _file(folder / "config.json", json.dumps(config).encode())
    return folder


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def test_a_broken_safetensors_header_is_found_before_anything_is_started(tmp_path: Path) -> None:
    folder = _model(tmp_path, LLAMA)
    _file(folder / "model.safetensors", (2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(AxiconError, match=r"model\.safetensors: .*header"):
        look(recipe(model=str(folder)))


def test_weights_that_are_missing_are_found_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="missing from the weights"):
        look(recipe(model=str(_model(tmp_path, LLAMA))))


def test_too_little_memory_is_found_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axicon.model.checkpoint.available_memory", lambda: 2**20)
    with pytest.raises(AxiconError, match=r"of memory needed for the weights, 0\.0 GiB available"):
        look(recipe(model="demo"))


def test_the_model_is_looked_at_in_a_process_that_does_not_stay() -> None:
    with Preparation(recipe(model="demo", port=8001)) as model:
        resolved = model.result()
        assert model.result() == resolved
    assert (resolved.served_name, resolved.port) == ("SmolLM2-135M-Instruct", 8001)
    assert (Path(resolved.model) / "model.safetensors").exists()
    with Preparation(recipe(model="./none")) as model, pytest.raises(AxiconError, match="none: no such file"):
        model.result()


def test_a_look_at_a_model_that_nobody_waits_for_is_ended() -> None:
    with pytest.raises(KeyboardInterrupt), Preparation(recipe(model="demo")) as model:
        raise KeyboardInterrupt
    assert model.process.returncode is not None


TRACEBACK = """The deployment failed to start. Error:
ray::ServeReplica.initialize()
  File "replica.py", line 1, in initialize
axicon.errors.AxiconError: model: 3 GiB needed, 1 GiB available; take a smaller model
"""


def test_the_reason_is_taken_out_of_rays_traceback() -> None:
    assert serve.failure(TRACEBACK) == "model: 3 GiB needed, 1 GiB available; take a smaller model"
    assert serve.failure("The deployment is starting.") is None
    assert serve.failure("AxiconError: ") is None


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_health_is_200_and_nothing_else(
    endpoint: int, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.healthy("127.0.0.1", endpoint)
    assert serve.healthy("0.0.0.0", endpoint)
    monkeypatch.setattr(Health, "status", 503)
    assert not serve.healthy("127.0.0.1", endpoint)
    assert not serve.healthy("127.0.0.1", free_port)


def test_the_ready_line_holds_a_command_that_can_be_pasted() -> None:
    line = serve.ready_line(recipe(port=8001, served_name="m"), 3.14159)
    assert line.startswith("m is ready after 3.1 s at http://127.0.0.1:8001 ")
    assert "\n" not in line
    words = shlex.split(line.partition("try: ")[2])
    assert words[:2] == ["curl", "http://127.0.0.1:8001/v1/chat/completions"]
    assert words[-1].startswith('{"messages"')
    assert "Authorization" not in line
    keyed = serve.ready_line(recipe(host="::", served_name="m", api_key_hashes=["ab" * 32]), 1)
    assert "http://[::1]:8000" in keyed
    assert "Authorization: Bearer" in keyed


def test_the_application_is_given_what_its_own_recipe_takes() -> None:
    args = recipe(port=8001, max_rows=3).app_args()
    assert ServeRecipe.model_validate(args) == ServeRecipe(max_rows=3)
