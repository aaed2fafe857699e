"""What HTTP costs: `python benchmarks/server.py [key=value ...]`.

Starts `axicon serve` behind HAProxy, and then behind Ray's proxy in Python; from each it streams in turns
with our engine in-process. `url=` measures a server that is already running instead. The client is lean on
purpose (it keeps what comes and reads it afterwards): a heavy one on the same cores would be measured as
well. Rates are tokens per second over all streams, from the moment every stream has its first token; medians
over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from measure import RESULTS, ROOT, complain, save, surroundings
from peer import make_prompts, workers
from pydantic import Field
from rich.console import Console
from rich.table import Table
from serving import serving

from axicon.errors import AxiconError
from axicon.model.machine import cores
from axicon.recipe import Dtype
from axicon.settings import Recipe, Words

WARM_TOKENS = 8
AT_ONCE_S = 0.002
"""What arrives within it was sent together; a step takes longer."""
SETTLE_S = 0.05
"""After the last stream's first token: until then events lag behind the steps, since the start of a stream
takes the server longer than its tokens."""


class ServerBench(Recipe):
    url: str | None = Field(None, description="a running server; none: start one for each of `proxies`")
    proxies: Words = Field(("haproxy", "python"), description="what stands before the servers started here")
    api_key: str | None = Field(None, description="its key, if it asks for one")
    streams: int = Field(8, ge=1, description="streams at the same time")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(64, ge=2, description="tokens each stream generates")
    rounds: int = Field(3, ge=1, description="turns of each")
    model: str = Field("demo", description="the model; with url, the one that is served there")
    peer: str = Field(
        "axicon-int8", description="how it is stored, as the server does: axicon-int8 or axicon"
    )
    dtype: Dtype = Field("bfloat16", description="numbers it computes in, as the server does")
    threads: int | None = Field(None, ge=1, description="compute threads in-process; none: one per core")
    out: Path = Field(RESULTS, description="folder for the JSON file")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Seconds since the requests were sent at which events came, and the tokens that had come by then."""

    events: list[float]
    counts: list[int]

    def tokens_by(self, at: float) -> int:
        place = bisect_right(self.events, at)
        return self.counts[place - 1] if place else 0


class Client(asyncio.Protocol):
    """Sends a request and keeps what comes back, with the time of each piece; it is looked at afterwards."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


async def ask(bench: ServerBench, path: str, body: str = "") -> list[tuple[float, bytes]]:
    """Pieces of the answer, each with the time it came. Raises AxiconError when nothing answers."""
    parts = urlsplit(bench.url or "")
    if parts.scheme != "http" or parts.hostname is None:
        raise AxiconError(f"url={bench.url}: an http address such as http://127.0.0.1:8000 is needed")
    headers = [
        f"{'POST' if body else 'GET'} {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Authorization: Bearer {bench.api_key}"] if bench.api_key else []),
    ]
    request = ("\r\n".join([*headers, "", ""]) + body).encode()
    loop = asyncio.get_running_loop()
    try:
        _, client = await loop.create_connection(lambda: Client(request), parts.hostname, parts.port or 80)
    except OSError as error:
        reason = f"nothing answers ({error.strerror}); start it with `axicon serve`"
        raise AxiconError(f"url={bench.url}: {reason}") from None
    await client.done
    return client.pieces


def completion(prompt: Sequence[int], new_tokens: int, **more: Any) -> str:
    """The body of a request for a completion."""
    body = {"prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps(body | more)


async def whole(bench: ServerBench, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Where in the text of the answer each token ends. Greedy text is the same every time, so what has come
    of it tells how many tokens have, which events do not say. Raises AxiconError for all but a whole answer.
    """
    pieces = checked(await ask(bench, "/v1/completions", completion(prompt, new_tokens, logprobs=0)))
    body = b"".join(data for _, data in pieces).partition(b"\r\n\r\n")[2]
    choice = json.loads(body)["choices"][0]
    ends = [*choice["logprobs"]["text_offset"][1:], len(choice["text"])]
    if len(ends) != new_tokens:
        raise AxiconError(
            f"a stream made {len(ends)} tokens, not {new_tokens}; is the model's context too short?"
        )
    return ends


async def stream(bench: ServerBench, prompt: Sequence[int], ends: Sequence[int], start: float) -> Stream:
    """One streamed completion, whose tokens are known to end there. Raises AxiconError for all but that."""
    pieces = checked(await ask(bench, "/v1/completions", completion(prompt, len(ends), stream=True)))
    found = Stream(events=[], counts=[])
    length = 0
    for at, data in timed_events(pieces):
        event = json.loads(data) if data != b"[DONE]" else {"choices": []}
        if "error" in event:
            raise AxiconError(f"the stream broke off: {event['error'].get('message')}")
        for choice in event["choices"]:
            length += len(choice["text"])
            found.events.append(at - start)
            found.counts.append(bisect_right(ends, length))
    if length != ends[-1]:
        raise AxiconError(f"a stream made {length} characters, and {ends[-1]} when it was asked before")
    return found


def checked(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The pieces of a good answer. Raises AxiconError for every other."""
    status, _, rest = b"".join(data for _, data in pieces).partition(b"\r\n")
    if b" 200 " not in status:
        said = rest.rpartition(b"\r\n\r\n")[2].decode()
        raise AxiconError(f"the server said {status.decode()}: {said[:300]}")
    return pieces


def timed_events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time, data) of each event. A proxy may cut the answer into chunks anywhere, inside of an event too."""
    raw = b"".join(data for _, data in pieces)
    ends = list(accumulate(len(data) for _, data in pieces))
    place = raw.index(b"\r\n\r\n") + 4
    left = b""
    while place < len(raw):
        size, _, _ = raw[place : place + 20].partition(b"\r\n")
        begin = place + len(size) + 2
        place = begin + int(size, 16) + 2
        *whole, left = (left + raw[begin : place - 2]).split(b"\n\n")
        at = pieces[min(bisect_left(ends, place - 2), len(pieces) - 1)][0]
        yield from ((at, event.removeprefix(b"data: ")) for event in whole)


async def served(
    bench: ServerBench, prompts: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
) -> dict[str, float]:
    """One turn of all streams. An event holds a token or, when the reader lags, several."""
    start = time.perf_counter()
    done = await asyncio.gather(
        *(stream(bench, prompt, its, start) for prompt, its in zip(prompts, ends, strict=True))
    )
    return {
        "decode_rate": decode_rate(done),
        "first_token": statistics.mean(one.events[0] for one in done),
        "tokens_per_event": sum(one.counts[-1] for one in done) / sum(len(one.events) for one in done),
    }


def decode_rate(streams: Sequence[Stream]) -> float:
    """Tokens per second of all streams together from soon after the last one began until the first one ends,
    because the rate of the few that are left is not the rate of all.
    """
    begun = max(one.events[0] for one in streams)
    leader = min(streams, key=lambda one: one.events[-1])
    end = leader.events[-1]
    settled = begun + min(SETTLE_S, (end - begun) / 4)
    # Two events of one stream: what was sent in one go with each is counted with it.
    start = next((at for at in leader.events if at > settled), end)
    if end <= start:
        raise AxiconError("a stream ended before the last one began; raise new_tokens")
    tokens = sum(one.tokens_by(end + AT_ONCE_S) - one.tokens_by(start + AT_ONCE_S) for one in streams)
    return tokens / (end - start)


def measure(bench: ServerBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    if bench.peer not in ("axicon", "axicon-int8"):
        raise AxiconError(f"peer={bench.peer}: a server of axicon is compared with axicon or axicon-int8")
    if unknown := set(bench.proxies) - {"haproxy", "python"}:
        raise AxiconError(f"proxies={','.join(unknown)}: known are haproxy and python")
    before = surroundings()
    threads = bench.threads or cores()
    through: dict[str, Any] = {}
    if bench.url is not None:
        asyncio.run(ask(bench, "/health"))  # that nothing answers is found out before a model is loaded
        through[bench.url] = _turns(bench, threads)
    for proxy in bench.proxies if bench.url is None else ():
        with tempfile.TemporaryDirectory() as folder:
            cluster = _cluster(proxy, Path(folder))
            words = {"cluster": cluster, "dtype": bench.dtype, "threads": threads}
            words["compressor"] = "none" if bench.peer == "axicon" else "auto"
            with serving(bench.model, [f"{key}={value}" for key, value in words.items()]) as server:
                through[proxy] = _turns(bench.model_copy(update={"url": server.url}), threads)
    return {
        "benchmark": "server",
        **before,
        "load_average_after": surroundings()["load_average"],
        "recipe": bench.model_dump(mode="json", exclude={"api_key", "out"}) | {"threads": threads},
        "through": through,
    }


def _cluster(proxy: str, folder: Path) -> Path:
    """The shipped cluster.yaml with this proxy."""
    content = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    content["metadata"]["env"]["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if proxy == "haproxy" else "0"
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _turns(bench: ServerBench, threads: int) -> dict[str, Any]:
    over_http: list[dict[str, Any]] = []
    in_process: list[dict[str, Any]] = []
    with workers([bench.peer], bench.model, bench.dtype, threads) as running:
        worker = running[bench.peer]

        def local(new_tokens: int) -> dict[str, Any]:
            return worker.run(streams=bench.streams, prompt_tokens=bench.prompt_tokens, new_tokens=new_tokens)

        prompts = make_prompts(bench.streams, bench.prompt_tokens, worker.about["vocab"])
        ends = [asyncio.run(whole(bench, prompt, bench.new_tokens)) for prompt in prompts]
        asyncio.run(served(bench, prompts, ends))
        local(WARM_TOKENS)
        for turn in range(bench.rounds):
            over_http.append(asyncio.run(served(bench, prompts, ends)))
            in_process.append(local(bench.new_tokens))
            complain(f"round {turn + 1} of {bench.rounds} done")
    lag = asyncio.run(loop_lag(bench))
    return {"http": _medians(over_http) | {"loop_lag_mean_s": lag}, "in_process": _medians(in_process)}


async def loop_lag(bench: ServerBench) -> float | None:
    """Mean seconds by which the server's event loop woke too late, from its own figures."""
    text = b"".join(data for _, data in await ask(bench, "/metrics")).decode(errors="replace")
    total, count = (
        sum(map(float, re.findall(rf"^axicon:event_loop_lag_seconds_{kind}\S* (\S+)", text, re.MULTILINE)))
        for kind in ("sum", "count")
    )
    return total / count if count else None


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in ("decode_rate", "first_token", "tokens_per_event") if name in runs[0]]
    return {
        **{name: statistics.median(run[name] for run in runs) for name in names},
        "decode_rate_all": [run["decode_rate"] for run in runs],
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['recipe']['streams']} streams, {result['cpu']}", title_justify="left")
    left = ("through", "where")
    for column in (*left, "tokens/s", "lowest", "first token ms", "behind", "later ms", "loop lag ms"):
        shown.add_column(column, justify="left" if column in left else "right")
    for name, one in result["through"].items():
        http, local = one["http"], one["in_process"]
        behind = 1 - http["decode_rate"] / local["decode_rate"]
        later = (http["first_token"] - local["first_token"]) * 1e3
        lag = http["loop_lag_mean_s"]
        marks = (f"{behind:.0%}", f"{later:.0f}", "" if lag is None else f"{lag * 1e3:.1f}")
        for where, row, last in (("in-process", local, ("", "", "")), ("HTTP", http, marks)):
            rates = row["decode_rate_all"]
            first = f"{row['first_token'] * 1e3:.0f}"
            shown.add_row(name, where, f"{row['decode_rate']:.1f}", f"{min(rates):.1f}", first, *last)
        shown.add_section()
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
