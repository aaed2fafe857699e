"""What HTTP costs: `python benchmarks/server.py url=http://127.0.0.1:8000 [key=value ...]`.

Streams from a server that is already running, and in turns with it the same from our engine in-process. The
client is lean on purpose (a socket and a line reader): a heavy one on the same cores would be measured as
well. Rates are tokens per second over all streams, from the moment every stream has its first token;
medians over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from measure import RESULTS, complain, save, surroundings
from peer import make_prompts, workers
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.model.machine import cores
from axicon.recipe import Dtype, Recipe

WARM_TOKENS = 8


class ServerBench(Recipe):
    url: str = Field("http://127.0.0.1:8000", description="a running axicon server")
    api_key: str | None = Field(None, description="its key, if it asks for one")
    streams: int = Field(8, ge=1, description="streams at the same time")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(64, ge=2, description="tokens each stream generates")
    rounds: int = Field(3, ge=1, description="turns of each")
    model: str = Field("demo", description="the model in-process; give the one that is served")
    peer: str = Field(
        "axicon-int8", description="how it is stored, as the server does: axicon-int8 or axicon"
    )
    dtype: Dtype = Field("bfloat16", description="numbers it computes in, as the server does")
    threads: int | None = Field(None, ge=1, description="compute threads in-process; none: one per core")
    out: Path = Field(RESULTS, description="folder for the JSON file")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Seconds since the requests were sent at which events with text came."""

    events: list[float]
    tokens: int


async def connect(bench: ServerBench) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(bench.url)
    if parts.scheme != "http" or parts.hostname is None:
        raise AxiconError(f"url={bench.url}: an http address such as http://127.0.0.1:8000 is needed")
    try:
        return await asyncio.open_connection(parts.hostname, parts.port or 80, limit=2**20)
    except OSError as error:
        reason = f"nothing answers ({error.strerror}); start it with `axicon serve`"
        raise AxiconError(f"url={bench.url}: {reason}") from None


async def stream(bench: ServerBench, prompt: Sequence[int], new_tokens: int, start: float) -> Stream:
    """One streamed completion. Raises AxiconError for every answer but a whole stream."""
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    headers = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {urlsplit(bench.url).netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Authorization: Bearer {bench.api_key}"] if bench.api_key else []),
    ]
    reader, writer = await connect(bench)
    try:
        writer.write(("\r\n".join([*headers, "", ""]) + body).encode())
        await writer.drain()
        status = (await reader.readline()).decode().strip()
        if " 200 " not in status:
            body = (await reader.read()).decode().rpartition("\r\n\r\n")[2]
            raise AxiconError(f"the server said {status}: {body[:300]}")
        return await _events(reader, start)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, start: float) -> Stream:
    """Lines that are not events (headers, chunk sizes) are passed over."""
    events: list[float] = []
    tokens = None
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        if "error" in event:
            raise AxiconError(f"the stream broke off: {event['error'].get('message')}")
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
        if event["choices"]:
            events.append(time.perf_counter() - start)
    if tokens is None or not events:
        raise AxiconError("the stream ended before it told its usage")
    return Stream(events=events, tokens=tokens)


async def served(bench: ServerBench, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """One turn of all streams. An event holds a token or, when the reader lags, several."""
    start = time.perf_counter()
    done = await asyncio.gather(*(stream(bench, prompt, new_tokens, start) for prompt in prompts))
    short = [one.tokens for one in done if one.tokens != new_tokens]
    if short:
        raise AxiconError(
            f"a stream made {short[0]} tokens, not {new_tokens}; is the model's context too short?"
        )
    first = max(one.events[0] for one in done)
    end = max(one.events[-1] for one in done)
    # Tokens before `first` are counted by their share of events: with one token per event this is exact.
    late = sum(sum(at > first for at in one.events) / len(one.events) * one.tokens for one in done)
    return {
        "decode_rate": late / (end - first),
        "first_token": statistics.mean(one.events[0] for one in done),
        "tokens_per_event": sum(one.tokens for one in done) / sum(len(one.events) for one in done),
    }


async def _answers(bench: ServerBench) -> None:
    """Find out that nothing answers before a model is loaded."""
    _, writer = await connect(bench)
    writer.close()


def measure(bench: ServerBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    if bench.peer not in ("axicon", "axicon-int8"):
        raise AxiconError(f"peer={bench.peer}: a server of axicon is compared with axicon or axicon-int8")
    asyncio.run(_answers(bench))
    before = surroundings()
    threads = bench.threads or cores()
    over_http: list[dict[str, Any]] = []
    in_process: list[dict[str, Any]] = []
    with workers([bench.peer], bench.model, bench.dtype, threads) as running:
        worker = running[bench.peer]

        def local(new_tokens: int) -> dict[str, Any]:
            return worker.run(streams=bench.streams, prompt_tokens=bench.prompt_tokens, new_tokens=new_tokens)

        prompts = make_prompts(bench.streams, bench.prompt_tokens, worker.about["vocab"])
        asyncio.run(served(bench, prompts, WARM_TOKENS))
        local(WARM_TOKENS)
        for turn in range(bench.rounds):
            over_http.append(asyncio.run(served(bench, prompts, bench.new_tokens)))
            in_process.append(local(bench.new_tokens))
            complain(f"round {turn + 1} of {bench.rounds} done")
    return {
        "benchmark": "server",
        **before,
        "load_average_after": surroundings()["load_average"],
        "recipe": bench.model_dump(mode="json", exclude={"api_key", "out"}) | {"threads": threads},
        "http": _medians(over_http),
        "in_process": _medians(in_process),
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in ("decode_rate", "first_token", "tokens_per_event") if name in runs[0]]
    return {
        **{name: statistics.median(run[name] for run in runs) for name in names},
        "decode_rate_all": [run["decode_rate"] for run in runs],
    }


def table(result: dict[str, Any]) -> Table:
    http, local = result["http"], result["in_process"]
    shown = Table(title=f"{result['recipe']['streams']} streams, {result['cpu']}", title_justify="left")
    for column in ("where", "tokens/s", "lowest", "first token ms"):
        shown.add_column(column, justify="left" if column == "where" else "right")
    for name, row in (("in-process", local), ("HTTP", http)):
        rates = row["decode_rate_all"]
        first = f"{row['first_token'] * 1e3:.0f}"
        shown.add_row(name, f"{row['decode_rate']:.1f}", f"{min(rates):.1f}", first)
    behind = 1 - http["decode_rate"] / local["decode_rate"]
    later = (http["first_token"] - local["first_token"]) * 1e3
    shown.caption = f"HTTP is {behind:.0%} behind, its first token {later:.0f} ms later"
    return shown


def main(words: Sequence[str]) -> None:
    bench = ServerBench.parse(words)
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('server', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"server: {error}")
