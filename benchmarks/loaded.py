"""What a job costs the server beside it: `python benchmarks/loaded.py [key=value ...]`.

Starts `axicon serve` with a dashboard, streams from it while nothing else runs, and then while a job measures
a model on the same cluster. Steps that only decode are counted by the server itself (`/metrics`), because
tokens that reach a client may have waited for each other. The bar is a 99th percentile beside the job, from
the moment it is submitted, of less than 3 medians of the quiet server, and that the job comes to its end.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, complain, save, surroundings
from peer import make_prompts
from pydantic import Field
from rich.console import Console
from rich.table import Table
from server import ServerBench, ask, checked, completion
from serving import serving

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words

BAR = 3.0
VOCAB = 10_000
"""Token ids of prompts are below this; every model has them."""


class LoadedBench(Recipe):
    model: str = Field("demo", description="what is served, and what the job measures")
    serve: Words = Field((), description="further words for `axicon serve`, such as threads=2")
    job: Words = Field(("window=512", "windows=12"), description="further words for the job's `evaluate`")
    streams: int = Field(4, ge=1, description="streams at the same time")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(200, ge=32, description="tokens each stream generates")
    rounds: int = Field(6, ge=1, description="turns of the quiet server")
    limit_s: float = Field(300, gt=0, description="give up on the start, and on the job, after this time")
    out: Path = Field(RESULTS, description="folder for the JSON file")


@dataclass(frozen=True)
class Steps:
    """Steps of the server so far: how many took at most so many seconds, by those seconds."""

    at_most: dict[float, float]

    def since(self, before: Steps) -> dict[str, float]:
        """Percentiles of the steps after `before`, in seconds, to some percent: the steps of a class are
        taken to be spread evenly."""
        counts = {bound: count - before.at_most[bound] for bound, count in self.at_most.items()}
        total = counts[math.inf]
        if not total:
            raise AxiconError("the server counted no step")
        return {"p50": _quantile(counts, 0.5), "p99": _quantile(counts, 0.99), "steps": total}


def _quantile(counts: dict[float, float], share: float) -> float:
    wanted, low, below = share * counts[math.inf], 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= wanted:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    raise AssertionError("a share is at most 1")


def steps(url: str) -> Steps:
    """What the server has counted. Raises AxiconError for a server that does not count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(r'^axicon:decode_step_seconds_bucket\{.*?le="([^"]+)".*?\} (\S+)$', text, re.MULTILINE)
    if not found:
        raise AxiconError("the server does not count its steps")
    return Steps({float(bound): float(count) for bound, count in found})


async def turn(asked: ServerBench, prompts: Sequence[Sequence[int]]) -> None:
    """One round of all streams."""
    bodies = [completion(prompt, asked.new_tokens, stream=True) for prompt in prompts]
    for pieces in await asyncio.gather(*(ask(asked, "/v1/completions", body) for body in bodies)):
        checked(pieces)


@contextmanager
def job(bench: LoadedBench, dashboard: str, token: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A measurement submitted to the cluster of the server."""
    text = folder / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() * 20)
    command = [
        sys.executable, "-m", "jobs", "submit", "--address", dashboard,
        "evaluate", bench.model, f"text={text}", f"out={folder}", *bench.job,
    ]  # fmt: skip
    env = {**os.environ, "RAY_AUTH_TOKEN_PATH": token}
    env.pop("RAY_AUTH_TOKEN", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as one:
        try:
            yield one
        finally:
            one.terminate()


def measure(bench: LoadedBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    before = surroundings()
    prompts = make_prompts(bench.streams, bench.prompt_tokens, VOCAB)
    starting = serving(bench.model, bench.serve, dashboard=True, limit_s=bench.limit_s)
    with starting as server, tempfile.TemporaryDirectory() as folder:
        asked = ServerBench(url=server.url, streams=bench.streams, new_tokens=bench.new_tokens)

        def rounds(count: int) -> dict[str, float]:
            before = steps(server.url)
            for _ in range(count):
                asyncio.run(turn(asked, prompts))
            return steps(server.url).since(before)

        rounds(1)  # warm
        quiet = rounds(bench.rounds)
        complain(f"quiet: {_told(quiet)}")
        begun, begin, course = time.monotonic(), steps(server.url), []
        end = begin
        with job(bench, server.dashboard, server.token(), Path(folder)) as running:
            while running.poll() is None:
                at, one = time.monotonic() - begun, rounds(1)
                if running.poll() is None:  # a round that saw the end saw a quiet server too
                    end = steps(server.url)
                    course.append({"at_s": at, **one})
                if time.monotonic() - begun > bench.limit_s:
                    raise AxiconError(f"the job did not end in {bench.limit_s:g} s; raise limit_s")
            seconds = time.monotonic() - begun
            assert running.stdout is not None
            log = running.stdout.read().splitlines()
        if running.returncode != 0 or not course:
            raise AxiconError(f"the job did not succeed, or ended too soon: {' | '.join(log[-3:])}")
        loaded = end.since(begin)
        complain(f"beside a job: {_told(loaded)}")
        after = rounds(2)
    first = next((line for line in log if line.startswith("axicon evaluate, job")), "")
    return {
        "benchmark": "loaded",
        **before,
        "recipe": bench.model_dump(mode="json", exclude={"out"}),
        "quiet": quiet,
        "loaded": loaded,
        "after": after,
        "course": course,
        "ratio": loaded["p99"] / quiet["p50"],
        "bar": BAR,
        "job_s": seconds,
        "job_threads": re.sub(r".*on \S+( \(\w+\))?, ", "", first),
        "job_last_line": log[-1].partition(" succeeded")[1].strip(),
    }


def _told(found: dict[str, float]) -> str:
    return f"p50 {found['p50'] * 1e3:.1f} ms, p99 {found['p99'] * 1e3:.1f} ms, {found['steps']:.0f} steps"


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['recipe']['streams']} streams, {result['cpu']}", title_justify="left")
    for column in ("server", "p50 ms", "p99 ms", "steps"):
        shown.add_column(column, justify="left" if column == "server" else "right")
    for name, key in (("quiet", "quiet"), ("beside a job", "loaded"), ("after it", "after")):
        row = result[key]
        times = (f"{row[one] * 1e3:.1f}" for one in ("p50", "p99"))
        shown.add_row(name, *times, f"{row['steps']:.0f}")
    verdict = "under" if result["ratio"] < BAR else "over"
    shown.caption = (
        f"p99 beside the job is {result['ratio']:.2f} of the quiet p50, {verdict} the bar of {BAR:g}; "
        f"the job took {result['job_s']:.0f} s with {result['job_threads'] or 'threads unknown'}"
    )
    return shown


def main(words: Sequence[str]) -> None:
    bench = LoadedBench.parse(words)
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('loaded', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"loaded: {error}")
