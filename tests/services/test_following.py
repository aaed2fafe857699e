"""Adapters that follow a zeroth-order run in a running server, over HTTP and with the engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from axicon.finetune.estimate import trained
from axicon.finetune.loop import digest
from axicon.generate.engine import Engine
from axicon.generate.request import Delta
from axicon.recipe import ServeRecipe
from jobs import finetune, replay
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe
from services.generation import engine_thread
from services.text import Text
from tests.services.live import Live, serving
from tests.services.test_adapters import ADMIN, KEY, ask, load, sha, text, unload
from tests.services.tiny import tiny_model

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run of it that has ended, and what replay makes of two of its steps."""
    folder = tmp_path_factory.mktemp("following")
    tiny_model(folder / "base", positions=1024)
    records = [{"text": f"number {i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    task = {"template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"}}
    asked = FinetuneRecipe.parse(
        model=str(folder / "base"), out=folder / "done", data={"train": str(folder / "data.jsonl"), **task},
        rule={"method": "zo_momentum", "lr": 0.3}, scheme={"method": "lora", "r": 2}, output="adapter",
        schedule={"kind": "linear"}, steps=STEPS, batch=4, threads=1,
    )  # fmt: skip
    finetune.run(asked)
    for step in (2, STEPS):
        replay.run(folder / "done", ReplayRecipe(step=step, out=folder / "loras" / f"at{step}"))
    return folder


@pytest.fixture
def run(place: Path) -> Iterator[Path]:
    """The run's folder as it was behind two steps, in the middle of writing the third."""
    folder = place / "loras" / "run"
    folder.mkdir()
    grow(place, folder, 2)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    for file in (place / "loras").glob(".served-*"):
        file.unlink()


def grow(place: Path, folder: Path, steps: int, torn: bytes = b'{"step"') -> None:
    """Let the log have that many steps."""
    lines = (place / "done" / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(b"".join(lines[: steps + 1]) + torn)


def recipe(place: Path) -> ServeRecipe:
    return ServeRecipe(
        model=str(place / "base"), compressor=None, dtype="float32", threads=1, kv_gib=0.02, max_rows=4,
        served_name="base", admin_key_hashes=(sha(KEY),),
        adapters={"folder": place / "loras", "follow_s": 0.01, "rank": 4},  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def live(place: Path) -> Iterator[Live]:
    """Whoever lets something join lets it leave."""
    with serving(recipe(place), engine_thread) as running:
        yield running


def follow(live: Live, name: str, path: str) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, "follow": True}
    return live.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)


def told(live: Live, name: str = "tuned") -> dict[str, object]:
    return live.client.get(f"/v1/models/{name}").json()["follows"]


def parameters(live: Live) -> str:
    """Digest of what the replica has, as runs print it of what they trained."""
    followed = live.server.adapters.loaded["tuned"].followed
    assert followed is not None
    assert followed._follower is not None
    return digest(trained(followed._follower.model))


def test_a_replica_catches_up_from_the_log(
    live: Live, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = text(ask(live))
    joined = follow(live, "tuned", "run").json()
    assert joined["follows"] == {"step": 2, "behind": 0, "trouble": None}
    assert follow(live, "tuned", "run").json() == joined  # the same again
    load(live, "at2", "at2")
    load(live, "at6", f"at{STEPS}")
    at = {step: text(ask(live, f"at{step}")) for step in (2, STEPS)}
    assert len({base, *at.values()}) == 3
    early = ask(live, "tuned")
    assert text(early) == at[2]
    assert parameters(live) == replay.run(place / "done", ReplayRecipe(step=2)).digest

    body = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    engine, renewed = live.server.thread.engine, threading.Event()

    def step() -> list[Delta]:
        """Slow enough for a request to be under way until the adapter is another one."""
        if not renewed.is_set():
            time.sleep(0.02)
        return Engine.step(engine)

    monkeypatch.setattr(engine, "step", step)
    under_way: list[str] = []
    long = threading.Thread(
        target=lambda: under_way.append(text(live.post("/v1/completions", model="tuned", **body).json()))
    )
    long.start()
    assert live.wait_until(lambda: live.server.unfinished > 0)
    grow(place, run, STEPS)
    assert live.wait_until(lambda: told(live)["step"] == STEPS, 1.0)
    renewed.set()
    assert live.server.unfinished, "the long request ended before the adapter was renewed"
    late = ask(live, "tuned")
    assert text(late) == at[STEPS]
    assert late["system_fingerprint"] != early["system_fingerprint"]
    assert parameters(live) == replay.run(place / "done", ReplayRecipe()).digest
    long.join()
    assert under_way == [text(live.post("/v1/completions", model="at2", **body).json())]
    figures = live.client.get("/metrics").text
    assert 'axicon:adapter_step{model_name="tuned"} 6.0' in figures
    assert 'axicon:adapter_steps_behind{model_name="tuned"} 0.0' in figures
    with serving(recipe(place), engine_thread) as again:  # a replica beside it, or the same one anew
        assert told(again) == told(live)
        assert ask(again, "tuned")["system_fingerprint"] == late["system_fingerprint"]
    for name in ("tuned", "at2", "at6"):
        assert unload(live, name).status_code == 200
    assert live.post("/v1/completions", prompt="Once", model="tuned").status_code == 404
    assert live.wait_until(lambda: not (engine.runner.native or engine.runner._added).held)


def test_a_request_that_is_planned_while_the_adapter_moves(
    live: Live, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the state that is there when it gets to the engine, which has given up the one before."""
    follow(live, "tuned", "run")
    number, plain = live.server.adapters.loaded["tuned"].number, Text.encode_beside

    async def slow(self: Text, text: str, *, special: bool) -> list[int]:
        grow(place, run, STEPS)
        while number in live.server.thread.engine._adapters:
            await asyncio.sleep(0.005)
        return await plain(self, text, special=special)

    monkeypatch.setattr(Text, "encode_beside", slow)
    meanwhile, after = ask(live, "tuned"), ask(live, "tuned")
    assert text(meanwhile) == text(after)
    assert meanwhile["system_fingerprint"] == after["system_fingerprint"]
    assert unload(live, "tuned").status_code == 200


def test_what_becomes_of_a_log_that_is_not_what_it_was(live: Live, place: Path, run: Path) -> None:
    follow(live, "tuned", "run")
    want = ask(live, "tuned")

    def stays(why: str) -> None:
        assert live.wait_until(lambda: why in str(told(live)["trouble"])), told(live)
        assert str(place) not in str(told(live)["trouble"])
        assert 'axicon:adapter_stuck{model_name="tuned"} 1.0' in live.client.get("/metrics").text
        now = ask(live, "tuned")
        assert (text(now), now["system_fingerprint"]) == (text(want), want["system_fingerprint"])

    grow(place, run, 1)
    stays("run/log.jsonl is the log of another run now, without the 2 steps")
    run.rename(place / "loras" / "moved")
    stays("run/log.jsonl: cannot be read")
    (place / "loras" / "moved").rename(run)
    grow(place, run, 3)
    assert live.wait_until(lambda: told(live) == {"step": 3, "behind": 0, "trouble": None})
    want = ask(live, "tuned")
    grow(place, run, 3, b'{"step":3,"loss":1.0,"g":[1.0,2.0]}\n')
    stays("step 3 is none of ZoMomentum")
    grow(place, run, 3, b'{"step":3,"loss":1.0,"g":[1e300]}\n')
    assert unload(live, "tuned").status_code == 200
    refused = follow(live, "tuned", "run")
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400, "adapters of block 0 are NaN or infinite: this run diverged",
    )  # fmt: skip


def test_another_run_than_was_loaded_is_not_served(live: Live, place: Path, run: Path) -> None:
    follow(live, "tuned", "run")
    [file] = (place / "loras").glob(".served-*")
    known = json.loads(file.read_text())
    file.write_text(json.dumps({"tuned": known["tuned"] | {"sha256": "0" * 64}}))  # as after a start
    assert [one["id"] for one in live.client.get("/v1/models").json()["data"]] == ["base"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base": "0" * 64}, "trained on a model with digest 000000000000, this server's has"),
        ({"scheme": {"name": "Full"}}, "run/log.jsonl: trains by the scheme Full, and only low-rank"),
        ({"rule": {"name": "AdamW"}}, "AdamW moves by gradients, which a log does not have"),
        ({"rule": {"name": "ZoSGD", "new": 1}}, "the rule ZoSGD is not as it is known here; update axicon"),
        ({"rule": {"name": "ZoSGD", "lr": "x"}}, "rule.lr: Input should be a valid number"),
        ({"scheme": {"name": "Lora", "r": 5}}, "scheme.r is 5, it must be a number from 1 to 4"),
        ({"scheme": {"name": "Lora", "r": 2, "targets": ["up", "x"]}}, "targets are some of q, k, v"),
        ({"seed": None}, "its first line is not one of axicon finetune"),
        ({"axicon_log": 2}, "a log of version 2"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_followed(live: Live, run: Path, changes: dict, why: str) -> None:
    header, *_ = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text(json.dumps(json.loads(header) | changes) + "\n")
    refused = follow(live, "tuned", "run")
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]
    assert [one["id"] for one in live.client.get("/v1/models").json()["data"]] == ["base"]


def test_what_is_no_run(live: Live, run: Path) -> None:
    def said(answer: httpx.Response) -> str:
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "it is an adapter: leave out 'follow'" in said(follow(live, "tuned", "at2"))
    assert 'it is a run: "follow": true' in said(load(live, "tuned", "run"))
    assert "no run of axicon finetune there" in said(follow(live, "tuned", "../done"))
    (run / "log.jsonl").write_text('{"axicon_log": 1')
    assert "only begun" in said(follow(live, "tuned", "run"))
