"""Serving a model for the time of a few questions: the last step of a run that compresses one.

The server is `axicon serve`, in a process of its own with a Ray of its own, asked over HTTP as anybody would.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from axicon.errors import RunFailed
from axicon.model.artefact import write_atomically
from axicon.recipe import LocalServeRecipe
from jobs.cluster import free_ports
from jobs.progress import Reporter
from jobs.report import Report, write_json
from jobs.serve import POLL_S, healthy

END_S = 60
"""Given to a server that was told to end."""
RECIPE, ANSWERS, LOG = "serve.yaml", "answers.json", "server.log"


class AskRecipe(LocalServeRecipe):
    """What to serve, and what to ask it."""

    questions: tuple[str, ...] = Field(
        ("Why is the sky blue?",), min_length=1, description="each is a chat of its own"
    )
    max_tokens: int = Field(40, ge=1, description="tokens of an answer")
    out: Path = Field(Path("artifacts/ask"), description="folder for answers and the server's log")


def run(recipe: AskRecipe, reporter: Reporter | None = None) -> Report:
    """Serve, ask, write the answers down, end the server.

    Raises RunFailed with the server's own last line where it cannot start, and where it gives no answer.
    """
    reporter, clock = reporter or Reporter(), time.perf_counter()
    recipe.out.mkdir(parents=True, exist_ok=True)
    with _server(recipe, reporter) as port:
        ready = time.perf_counter() - clock
        answers = [_ask(port, question, recipe.max_tokens) for question in recipe.questions]
    for answer in answers:
        reporter.say(f"{answer['question']}  {' '.join(answer['answer'].split())}")
    write_json(recipe.out / ANSWERS, {"model": recipe.model, "answers": answers})
    return Report(
        verb="ask",
        recipe=recipe,
        metrics={
            "ready_s": ready,
            "first_token_s": min(answer["first_token_s"] for answer in answers),
            "tokens_per_s": max(answer["tokens_per_s"] for answer in answers),
        },
        seconds=time.perf_counter() - clock,
        files=(recipe.out / ANSWERS,),
        details={"answers": answers},
    )


@contextlib.contextmanager
def _server(recipe: AskRecipe, reporter: Reporter) -> Iterator[int]:
    """The port of a server that is ready. It has ended when the block has."""
    [port] = free_ports(1)
    asked = recipe.model_dump(mode="json", include=set(LocalServeRecipe.model_fields)) | {"port": port}
    write_atomically(recipe.out / RECIPE, LocalServeRecipe.model_validate(asked).as_yaml())
    command = [sys.executable, "-m", "jobs", "serve", str(recipe.out / RECIPE)]
    # In a job, what Ray says of itself in the environment is of another Ray than the server's.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    log = recipe.out / LOG
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env)
    reporter.say(f"serving {recipe.model} on port {port}; its log is {log}")
    try:
        deadline = time.monotonic() + recipe.ready_s
        while not healthy(recipe.host, port):
            if process.poll() is not None:
                raise RunFailed(f"the server ended: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise RunFailed(f"ready_s={recipe.ready_s:g}: the server was not ready in time; see {log}")
            time.sleep(POLL_S)
        yield port
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "without a word")
    return said.removeprefix("axicon: ")


def _ask(port: int, question: str, max_tokens: int) -> dict[str, Any]:
    """The greedy answer, streamed. Raises RunFailed where there is none."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    text, first, usage, begin = "", None, None, time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RunFailed(f"the server answered {response.status}: {response.read(500).decode()}")
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if not data.startswith(b"{"):
                continue
            event = json.loads(data)
            if event.get("choices") and (piece := event["choices"][0]["delta"].get("content")):
                first = first or time.perf_counter()
                text += piece
            usage = event.get("usage") or usage
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise RunFailed(f"the server's answer broke off ({error})") from error
    finally:
        connection.close()
    if usage is None:
        raise RunFailed("the server's answer broke off before its end")
    end, tokens = time.perf_counter(), int(usage["completion_tokens"])
    first = first or end
    return {
        "question": question,
        "answer": text,
        "first_token_s": first - begin,
        "tokens_per_s": (tokens - 1) / (end - first) if end > first else 0.0,
    }
