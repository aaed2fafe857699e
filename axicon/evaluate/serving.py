"""What a model does when it is served: speed, first-token time, peak memory, greedy continuations.

Measured in a process of its own, because memory that a process has used before cannot be told from what the
model takes. The process is given and gives plain data: a line of JSON in, lines of JSON out.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from pydantic import TypeAdapter

from axicon.errors import AxiconError, RunFailed, counted

if TYPE_CHECKING:
    from axicon.protocols import Compressor

DTYPE: Literal["bfloat16"] = "bfloat16"
"""Speed is measured as a model is served, whatever its perplexity is computed in."""
STATUS = Path("/proc/self/status")

Progress = Callable[[int, int, str], None]
Continuation = tuple[list[int], list[int]]
"""A prompt's tokens, and those that follow it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    tokens_per_s: Mapping[str, float]
    """Over all streams, by their number."""
    first_token_ms: float | None
    peak_memory: int | None
    """Resident bytes at their highest, less what the process had before it read the model."""
    continuations: Sequence[Continuation]
    conditions: str
    first_token_conditions: str
    reason: Mapping[str, str] = field(default_factory=dict)
    """Why something is not there, by the name of its field."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From what `asdict` gave."""
        return cls(**plain)


def measure(
    folder: Path,
    *,
    threads: int | None = None,
    compressor: Compressor | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Serving:
    """In another process: load the model, speed of 1 and 8 streams, first token, continuations.

    `compressor` is applied to a dense model after loading. Raises AxiconError for what the other process
    could not do.
    """
    asked = json.dumps({"folder": str(folder), "threads": threads, "compressor": _named(compressor)})
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "axicon.evaluate.serving", asked],
        stdin=subprocess.PIPE,  # its end tells the other process that this one is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C comes here alone, and what is started here is ended here
    )
    assert process.stdout is not None
    assert process.stderr is not None
    noise: list[str] = []
    reader = threading.Thread(target=lambda stream: noise.extend(stream), args=(process.stderr,), daemon=True)
    reader.start()
    try:
        answer = _answer(process.stdout, progress)
        process.wait()
    finally:
        process.kill()
        process.wait()
        reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()
    if answer is None:
        last = next((line.strip() for line in reversed(noise) if line.strip()), "it said nothing")
        raise RunFailed(f"the process that measured {folder} ended with {process.returncode}: {last}")
    return answer


def _named(compressor: Compressor | None) -> dict[str, Any] | None:
    """A method as plain data."""
    from axicon.compress import COMPRESSORS

    if compressor is None:
        return None
    name = next(name for name, cls in COMPRESSORS.items() if cls is type(compressor))
    return {"method": name, "settings": asdict(compressor)}  # type: ignore[call-overload]


def _built(named: Mapping[str, Any] | None) -> Compressor | None:
    """What `_named` said; JSON has made lists of tuples."""
    from axicon.compress import COMPRESSORS

    return (
        None
        if named is None
        else TypeAdapter(COMPRESSORS[named["method"]]).validate_python(named["settings"])
    )


def _answer(lines: IO[str], progress: Progress) -> Serving | None:
    for line in lines:
        said = json.loads(line)
        if "progress" in said:
            progress(*said["progress"])
        elif "error" in said:
            raise AxiconError(said["error"])
        else:
            return Serving.of(said["measured"])
    return None


def measure_here(
    folder: Path,
    *,
    threads: int | None = None,
    compressor: Compressor | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Serving:
    """The same in this process. Memory is right only if it did nothing before."""
    import torch

    from axicon.compress.walk import Compress
    from axicon.evaluate import agreement, speed
    from axicon.generate.build import build_engine
    from axicon.model import checkpoint
    from axicon.model.adapterfile import locate

    tokenizer = checkpoint.load_tokenizer(locate(folder).base)
    before = _resident("VmRSS")
    transform = None if compressor is None else Compress(compressor)
    engine = build_engine(str(folder), dtype=DTYPE, threads=threads, transform=transform)
    reason: dict[str, str] = {}

    def unless_too_short(name: str, action: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return action()
        except speed.TooShort as error:
            reason[name] = str(error)
            return otherwise

    rates = unless_too_short("tokens_per_s", lambda: speed.rates(engine, progress=progress), [])
    first = unless_too_short("first_token_ms", lambda: speed.first_token(engine), None)
    texts = unless_too_short("continuations", lambda: agreement.continuations(engine, tokenizer), [])
    peak = _resident("VmHWM")
    if before is None or peak is None:
        reason["peak_memory"] = "this system does not say how much memory a process had at most"
    machine = f"{processor()}, {counted(torch.get_num_threads(), 'thread')}, {DTYPE}, greedy"
    return Serving(
        tokens_per_s={str(rate.streams): round(rate.tokens_per_s, 2) for rate in rates},
        first_token_ms=None if first is None else round(first * 1000, 2),
        peak_memory=None if before is None or peak is None else peak - before,
        continuations=texts,
        conditions=(
            f"{machine}, prompts of {speed.PROMPT_TOKENS} tokens, {speed.NEW_TOKENS} new ones"
        ),
        first_token_conditions=f"{machine}, one prompt of {speed.FIRST_PROMPT_TOKENS} tokens",
        reason=reason,
    )  # fmt: skip


def processor() -> str:
    """The processor's name, or its kind where the system has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def _resident(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def main() -> None:
    """The other process: what is asked is its only argument."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    asked = json.loads(sys.argv[1])

    def tell(done: int, total: int, note: str) -> None:
        print(json.dumps({"progress": [done, total, note]}), file=answers)

    try:
        measured = measure_here(
            Path(asked["folder"]),
            threads=asked["threads"],
            compressor=_built(asked["compressor"]),
            progress=tell,
        )
        answer: dict[str, Any] = {"measured": asdict(measured)}
    except AxiconError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=answers)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
