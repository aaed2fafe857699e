"""One program that decodes, in a process of its own: `python benchmarks/peer.py NAME SETTINGS`.

It reads one JSON object per line, `{"streams": 8, ...}`, and answers each with the times of one run. A
process per peer keeps their memory apart and their thread pools from meeting; while another is measured it
waits for its next line. A new peer is one class and one entry in `PEERS`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from measure import pss_bytes

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of all streams together. Seconds count from the moment the prompts were handed over."""

    first_token_s: list[float]
    """Per stream."""
    decode_s: float
    """From the moment every stream had its first token until the first stream ended."""
    decode_tokens: int
    """Tokens made in that time, over all streams."""
    total_s: float
    tokens: list[list[int]]
    """What was generated, per stream."""
    parts_s: dict[str, float] | None = None
    """Seconds of a decode step by what they went into, where the peer can tell."""

    @property
    def decode_rate(self) -> float:
        """Tokens per second over all streams."""
        return self.decode_tokens / self.decode_s


class Peer(Protocol):
    needs: ClassVar[str]
    """The package it comes in."""

    def __init__(self, model: str, dtype: str, threads: int) -> None: ...

    def weight_bytes(self) -> int:
        """Bytes of weights that every step has to read."""
        ...

    def vocab(self) -> int: ...

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        """Continue all prompts together by exactly so many tokens."""
        ...


class Axicon:
    """Our engine, in-process: what the server adds is measured by `server.py`."""

    needs: ClassVar[str] = "axicon"

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from axicon.generate.build import build_engine

        change = self.transform()
        self.engine = build_engine(model, dtype=dtype, threads=threads, transform=change)  # type: ignore[arg-type]
        self.bytes = self.count_bytes(model, dtype)
        self.number = 0

    def transform(self) -> Any:
        """What is done to the model before it is packed."""
        return None

    def count_bytes(self, model: str, dtype: str) -> int:
        return _weight_bytes(model, dtype)

    def weight_bytes(self) -> int:
        return self.bytes

    def vocab(self) -> int:
        return self.engine.runner.capacity.vocab

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        from axicon.generate.request import Request, SamplingParams

        self.number += 1
        params = SamplingParams(
            max_tokens=new_tokens, temperature=temperature, top_p=top_p, ignore_eos=True, seed=self.number
        )
        tokens: list[list[int]] = [[] for _ in prompts]
        first: list[float] = [0.0] * len(prompts)
        ended: list[tuple[float, int]] = []
        spent: list[dict[str, float]] = []
        whole = 0
        """Steps until the first stream ended: those that began early end early, and the rate of the few that
        are left is not the rate of all."""
        native = self.engine.runner.native  # type: ignore[attr-defined]
        start = time.perf_counter()
        for stream, prompt in enumerate(prompts):
            self.engine.add(Request(id=f"{self.number}-{stream}", prompt=prompt, params=params))
        while self.engine.has_work:
            deltas = self.engine.step()
            now = time.perf_counter() - start
            for delta in deltas:
                stream = int(delta.request_id.split("-")[1])
                if delta.tokens and not tokens[stream]:
                    first[stream] = now
                tokens[stream] += delta.tokens
            ended.append((now, sum(len(delta.tokens) for delta in deltas)))
            spent.append(native.seconds() if native else {})
            if any(delta.finish_reason for delta in deltas) and len(ended) > 1:
                whole = whole or len(ended)
        last_first = max(first)
        total_s = ended[-1][0]
        if ended[whole - 1][0] > last_first:  # else some ended before the last began: there is no such time
            ended, spent = ended[:whole], spent[:whole]
        decode = [(at, count) for at, count in ended if at > last_first and count]
        return Run(
            first_token_s=first,
            decode_s=decode[-1][0] - last_first,
            decode_tokens=sum(count for _, count in decode),
            total_s=total_s,
            tokens=tokens,
            parts_s=_parts(ended, spent, last_first) if native else None,
        )


def _parts(
    ended: Sequence[tuple[float, int]], spent: Sequence[Mapping[str, float]], last_first: float
) -> dict[str, float]:
    """Mean seconds per decode step inside the kernels, and `python` for all that is outside of them."""
    first = next(i for i, (at, _) in enumerate(ended) if at >= last_first)
    steps = len(ended) - 1 - first
    parts = {name: (spent[-1][name] - spent[first][name]) / steps for name in spent[-1]}
    whole = (ended[-1][0] - ended[first][0]) / steps
    return parts | {"python": whole - sum(parts.values())}


class AxiconInt8(Axicon):
    """What `axicon serve` runs by default."""

    def transform(self) -> Any:
        from axicon.compress import COMPRESSORS
        from axicon.compress.walk import Compress
        from axicon.recipe import SERVED_BY_DEFAULT

        return Compress(SERVED_BY_DEFAULT.build(COMPRESSORS, "compressor"))

    def count_bytes(self, model: str, dtype: str) -> int:
        return _weight_bytes(model, "int8")


class AxiconInt4(Axicon):
    """4 bits in groups of 64 with an int8 head, rounded without data: which codes they are costs no time."""

    def transform(self) -> Any:
        from axicon.compress.group_int4 import GroupInt4
        from axicon.compress.walk import Compress

        return Compress(GroupInt4(group=64, head="int8"))

    def count_bytes(self, model: str, dtype: str) -> int:
        native = self.engine.runner.native  # type: ignore[attr-defined]
        return int(native.weight_bytes) if native else _weight_bytes(model, "int8") // 2


class AxiconInt8Sampled(AxiconInt8):
    """The same, drawing its tokens: what sampling costs beside greedy decoding in the same run."""

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        return super().run(prompts, new_tokens, temperature=0.7, top_p=0.9)


class Transformers:
    """`transformers` as its users call it: one batch, `generate`, its default cache."""

    needs: ClassVar[str] = "transformers"

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from axicon.model.checkpoint import resolve

        torch.set_num_threads(threads)
        self.bytes = _weight_bytes(model, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None  # every stream makes exactly the tokens asked for

    def weight_bytes(self) -> int:
        return self.bytes

    def vocab(self) -> int:
        return int(self.model.config.vocab_size)

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        import torch

        ended: list[float] = []

        def note(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ended.append(time.perf_counter() - start)
            return torch.zeros(len(ids), dtype=torch.bool)

        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=bool(temperature),
                pad_token_id=0,
                stopping_criteria=[note],
                **{key: value for key, value in sampling.items() if key != "do_sample"},
            )
        return Run(
            first_token_s=[ended[0]] * len(prompts),
            decode_s=ended[-1] - ended[0],
            decode_tokens=(new_tokens - 1) * len(prompts),
            total_s=ended[-1],
            tokens=out[:, ids.shape[1] :].tolist(),
        )


PEERS: dict[str, str] = {
    "axicon": "peer:Axicon",
    "axicon-int8": "peer:AxiconInt8",
    "axicon-int4": "peer:AxiconInt4",
    "axicon-int8-sampled": "peer:AxiconInt8Sampled",
    "transformers": "peer:Transformers",
    "ctranslate2-int8": "others:CTranslate2Int8",
    "openvino-int8": "others:OpenVINO",
    "openvino-int4": "others:OpenVINOInt4",
    "vllm": "others:VLLM",
}


def peer_class(name: str) -> type[Peer]:
    module, _, attribute = PEERS[name].partition(":")
    found: type[Peer] = getattr(importlib.import_module(module), attribute)
    return found


def _weight_bytes(model: str, dtype: str) -> int:
    """Every weight once; an embedding that is not also the head is not read, rows of it are looked up."""
    import torch

    from axicon.model.checkpoint import shape_of
    from axicon.model.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(shape_of(model))
    count = sum(weight.numel() for weight in decoder.parameters())
    if decoder.lm_head.weight is not decoder.embed_tokens.weight:
        count -= decoder.embed_tokens.weight.numel()
    return count * int(getattr(torch, dtype).itemsize)


def make_prompts(streams: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random token ids: speed does not depend on what they say."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(streams)]


class Worker:
    """The other end of the pipe: starts a peer, asks it to run, ends it."""

    def __init__(self, name: str, model: str, dtype: str, threads: int) -> None:
        self.name = name
        settings = json.dumps({"model": model, "dtype": dtype, "threads": threads})
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), name, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self.about = self._read()

    def run(self, **settings: Any) -> dict[str, Any]:
        """Times of one run, see `Run`, with `decode_rate` and memory after it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def workers(names: Sequence[str], model: str, dtype: str, threads: int) -> Iterator[dict[str, Worker]]:
    started: dict[str, Worker] = {}
    try:
        for name in names:
            started[name] = Worker(name, model, dtype, threads)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def main(name: str, settings: Mapping[str, Any]) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not end between the answers
    began = time.perf_counter()
    peer = peer_class(name)(settings["model"], settings["dtype"], settings["threads"])
    about = {
        "load_s": time.perf_counter() - began,
        "weight_bytes": peer.weight_bytes(),
        "vocab": peer.vocab(),
    }
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = make_prompts(asked["streams"], asked["prompt_tokens"], peer.vocab())
        run = peer.run(prompts, asked["new_tokens"], asked.get("temperature", 0.0), asked.get("top_p", 1.0))
        answer = asdict(run) | {
            "decode_rate": run.decode_rate,
            "first_token": statistics.mean(run.first_token_s),
            "pss_bytes": pss_bytes([os.getpid()]),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
