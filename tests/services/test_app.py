"""`services.app:build`: what is handed to Serve. That it runs there is `test_serve_ray.py`'s to show."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys

import pytest

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.app import SPARE, build, check_bind


def test_serve_can_validate_the_arguments() -> None:
    """Serve reads the annotation of the one parameter and needs the class there, not its name."""
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServeRecipe


def test_replicas_get_digests_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_TEST_KEYS", "sk-secret")
    application = build(ServeRecipe(api_keys_env="AXICON_TEST_KEYS"))
    (recipe,) = application._bound_deployment.init_args
    assert recipe.api_keys_env is None
    assert recipe.api_key_hashes == (hashlib.sha256(b"sk-secret").hexdigest(),)
    assert "sk-secret" not in repr(application._bound_deployment.init_args)


def test_keys_that_are_asked_for_and_missing_are_an_error_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AXICON_TEST_KEYS", raising=False)
    with pytest.raises(AxiconError, match="AXICON_TEST_KEYS"):
        build(ServeRecipe(api_keys_env="AXICON_TEST_KEYS"))


def test_our_own_refusal_comes_before_the_one_of_serve() -> None:
    deployment = build(ServeRecipe(max_rows=3, max_queue=5))._bound_deployment
    assert deployment.max_ongoing_requests == 3 + 5 + SPARE


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_who_wants_a_gpu_asks_ray_for_it(device: str, gpus: int) -> None:
    options = build(ServeRecipe(device=device))._bound_deployment.ray_actor_options
    assert options["num_gpus"] == gpus


def test_deploying_loads_no_torch() -> None:
    code = "import sys, services.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_keys_a_replica_refuses_a_serve_that_others_reach(host: str) -> None:
    with pytest.raises(AxiconError, match=f"Serve listens on {host}, where others reach it"):
        check_bind(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_without_keys_a_replica_takes_a_serve_on_loopback(host: str) -> None:
    check_bind(host)


def test_code_goes_to_the_applications_that_bring_none() -> None:
    from services.__main__ import with_code

    config = {
        "http_options": {"port": 1},
        "applications": [{"name": "a"}, {"name": "b", "runtime_env": {"working_dir": "s3://own.zip"}}],
    }
    first, second = with_code(config, "gcs://code.zip")["applications"]
    assert first == {"name": "a", "runtime_env": {"working_dir": "gcs://code.zip"}}
    assert second["runtime_env"] == {"working_dir": "s3://own.zip"}
    assert "runtime_env" not in config["applications"][0]
