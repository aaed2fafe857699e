"""Keys and hosts: who is answered."""

from __future__ import annotations

import hashlib
import logging

import pytest
from starlette.datastructures import Headers

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.auth import Access
from services.errors import ApiError
from services.generation import GenerationServer
from tests.services.fake_engine import FakeThread
from tests.services.live import serving
from tests.services.test_completions import refused

KEY, OTHER = "sk-one-secret", "sk-two-secret"


def test_with_keys_everything_but_health_and_page_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AXICON_TEST_KEYS", KEY)
    recipe = ServeRecipe(
        api_keys_env="AXICON_TEST_KEYS", api_key_hashes=(hashlib.sha256(OTHER.encode()).hexdigest(),)
    )
    with serving(recipe) as live:
        for path in ("/", "/health", "/pages/playground.js"):
            assert live.client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/openapi.json", "/nothing"):
            response = live.client.get(path)
            assert refused(response, 401)[1] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for key in (KEY, OTHER):
            headers = {"Authorization": f"Bearer {key}"}
            assert live.client.get("/metrics", headers=headers).status_code == 200
            answer = live.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 200
        for wrong in (f"Bearer {KEY}x", "Bearer", f"Basic {KEY}", KEY, "Bearer é"):
            response = live.client.get("/v1/models", headers={"Authorization": wrong.encode()})
            refused(response, 401)
            assert KEY not in response.text
        # Keys are what keeps strangers out; the name they call the server by does not matter then.
        headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example"}
        assert live.client.get("/v1/models", headers=headers).status_code == 200
    assert "secret" not in caplog.text


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, two: bytes) -> bool:
        compared.append(two)
        return one == two

    monkeypatch.setattr("services.auth.hmac.compare_digest", compare)
    digests = [hashlib.sha256(key.encode()).digest() for key in (KEY, OTHER)]
    Access(digests).check("/v1/models", Headers({"authorization": f"Bearer {KEY}"}))
    assert compared == digests


def test_a_named_variable_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXICON_TEST_KEYS", raising=False)
    with pytest.raises(AxiconError, match="AXICON_TEST_KEYS"):
        GenerationServer(ServeRecipe(api_keys_env="AXICON_TEST_KEYS"), FakeThread)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:80", "localhost:8000", "LOCALHOST", "[::1]:80", "a.localhost"]
)
def test_without_keys_loopback_names_are_answered(host: str) -> None:
    Access().check("/v1/models", Headers({"host": host}), "127.0.0.1")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "192.168.1.5",
        "",
        "localhost.evil",
        "[fe80::1]",
    ],
)
def test_without_keys_other_names_are_refused(host: str) -> None:
    with pytest.raises(ApiError) as caught:
        Access().check("/", Headers({"host": host}), "127.0.0.1")
    assert (caught.value.status, caught.value.code) == (403, "host_not_allowed")


def test_without_keys_another_machine_is_refused_whatever_it_says() -> None:
    with pytest.raises(ApiError) as caught:
        Access().check("/v1/models", Headers({"host": "localhost"}), "192.168.1.5")
    assert (caught.value.status, caught.value.code) == (403, "peer_not_allowed")


def test_allowed_hosts_are_answered_too() -> None:
    access = Access(hosts=["Box.lan"])
    access.check("/v1/models", Headers({"host": "box.lan:8000"}), "192.168.1.5")
    with pytest.raises(ApiError):
        access.check("/v1/models", Headers({"host": "evil.example"}), "192.168.1.5")


def test_a_page_that_rebinds_its_name_gets_nothing() -> None:
    with serving() as live:
        response = live.client.post("/v1/completions", json={"prompt": "a"}, headers={"Host": "evil.example"})
        assert refused(response, 403)[1] == "host_not_allowed"
        assert live.fake.last == []
