"""The benchmarks run, and what they compare is the same work."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.generation import engine_thread
from tests.evaluate.tiny import make_tokenizer, save_model
from tests.services.live import serving

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", make_tokenizer(), 128)


def run(script: str, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A benchmark as it is typed, and the file it wrote to `out=`."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    folders = [Path(word.removeprefix("out=")) for word in words if word.startswith("out=")]
    files = [path for folder in folders for path in folder.glob("*.json")]
    return done, json.loads(files[0].read_text()) if files else {}


@pytest.mark.slow
def test_decoding_beside_transformers(model: Path, tmp_path: Path) -> None:
    done, result = run(
        "decode.py", f"model={model}", "peers=axicon,transformers", "dtype=float32", "threads=1",
        "streams=1,3", "rounds=1",
        "prompt_tokens=20", "new_tokens=9", f"out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(result["peers"]) == {"axicon", "transformers"}
    assert result["same_text"]["transformers"] == {"1": 1.0, "3": 1.0}
    for peer in result["peers"].values():
        assert peer["weight_bytes"] == 4 * (400 * 32 + 2 * (32 * 128 * 3 + 32 * 48 * 3 + 2 * 32) + 32)
        for streams, row in peer["streams"].items():
            assert len(row["tokens_per_s_all"]) == 1
            assert row["step_s"] == pytest.approx(int(streams) / row["tokens_per_s"])
    assert result["versions"]["torch"]
    assert "tokens/s" in done.stdout
    assert list(tmp_path.glob("*.png"))


def test_a_peer_that_is_not_installed_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import decode
    import peer

    monkeypatch.setattr(peer, "Other", type("Other", (), {"needs": "a_package_nobody_has"}), raising=False)
    monkeypatch.setitem(peer.PEERS, "other", "peer:Other")
    assert decode._is_present("axicon")
    assert not decode._is_present("other")
    assert "other is not measured: the package a_package_nobody_has" in capsys.readouterr().err
    with pytest.raises(Exception, match="peers=unknown: known are axicon, axicon-int8, axicon-i"):
        decode._is_present("unknown")


def test_streams_over_http_are_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import server
    from peer import make_prompts

    recipe = ServeRecipe(model=str(model), dtype="float32", threads=1, kv_gib=0.05, max_rows=4)
    with serving(recipe, engine_thread) as live:
        bench = server.ServerBench(url=live.url)
        prompts = make_prompts(3, 20, 400)
        ends = [asyncio.run(server.whole(bench, prompt, 30)) for prompt in prompts]
        figures = asyncio.run(server.served(bench, prompts, ends))
        short = asyncio.run(server.whole(bench, prompts[0], 5))
        one = asyncio.run(server.stream(bench, prompts[0], short, 0.0))
        with pytest.raises(AxiconError, match=r"the server said HTTP/1.1 400 .*max_tokens"):
            asyncio.run(server.whole(bench, prompts[0], 5000))
        with pytest.raises(AxiconError, match="characters, and 1000 when it was asked before"):
            asyncio.run(server.stream(bench, prompts[0], [*short[:4], 1000], 0.0))
    assert one.counts[-1] == 5
    assert one.counts == sorted(one.counts)
    assert 1 <= len(one.events) <= 5
    assert figures["decode_rate"] > 0
    assert 1.0 <= figures["tokens_per_event"] <= 30


@pytest.mark.parametrize("gathered", [0.0, 0.02])
def test_the_rate_over_http_is_that_of_the_steps(gathered: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight streams that begin in two steps, and are told of after so many seconds at the earliest."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import server

    step, tokens = 0.007, 64
    made, told_of = [0] * 8, [0] * 8
    streams = [server.Stream(events=[], counts=[]) for _ in range(8)]
    now = told = 0.0
    for number in range(tokens + 1):
        now += 0.035 if number < 2 else step
        due = now - told >= gathered
        for one in range(4 if number == 0 else 8):
            if made[one] < tokens:
                made[one] += 1
                due = due or made[one] in (1, tokens)
        if due:
            told = now
            for one in range(8):
                if made[one] > told_of[one]:
                    # One write after another, and the first of a stream takes longest.
                    streams[one].events.append(now + 1e-4 * one + (0.004 * one if told_of[one] == 0 else 0))
                    streams[one].counts.append(made[one])
                    told_of[one] = made[one]
    assert server.decode_rate(streams) == pytest.approx(8 / step, rel=1e-6)


def test_no_server_is_one_line(free_port: int) -> None:
    done, _ = run("server.py", f"url=http://127.0.0.1:{free_port}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"server: url=http://127.0.0.1:{free_port}: nothing answers (")
    assert done.stderr.count("\n") == 1


def test_processes_are_found_by_what_they_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure
    import serving as started
    import startup

    child = subprocess.Popen(
        ["sh", "-c", "sleep 30 & wait"], env={started.MARK: "abc"}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 5
        while len(started.marked("abc")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        found = started.marked("abc")
        assert child.pid in found
        assert {startup._name(pid) for pid in found} == {"sh", "sleep"}
        assert measure.pss_bytes(found) > 0
    finally:
        for pid in started.marked("abc"):
            subprocess.run(["kill", str(pid)], check=False)
        child.wait(5)
    deadline = time.monotonic() + 5
    while started.marked("abc") and time.monotonic() < deadline:
        time.sleep(0.01)  # the grandchild ends in its own time
    assert started.marked("abc") == []
