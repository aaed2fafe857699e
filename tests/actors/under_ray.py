"""A job for `test_group_ray.py`: shard groups on a cluster. Its last line is what it found, as JSON.

Arguments: a directory with the models `llama` and `opt`, both of 3 blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from ray.util.placement_group import placement_group_table

import actors.shard
from actors.group import ShardGroup
from actors.shard import StageSettings
from axicon.errors import AxiconError
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams
from axicon.model import checkpoint
from axicon.place import Plan, Stage
from axicon.protocols import Runner
from axicon.step import StepInput

SETTINGS = {"dtype": "float32", "max_rows": 8, "prefill_chunk": 16, "kv_bytes": 8 << 20}
PROMPTS = {"short": 3, "chunks": 40, "gone": 21, "edge": 16, "late": 30}


class Letters:
    """One character per token."""

    all_special_ids = ()

    def decode(self, token_ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(chr(64 + i) for i in token_ids)


def texts(runner: Runner) -> dict[str, list[str | None]]:
    """Text and finish of requests beside each other; one is cancelled on its way, one comes later."""
    source = torch.Generator().manual_seed(11)
    engine = Engine(runner, Letters(), eos_ids=[1])
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    requests = [
        Request(id=name, prompt=torch.randint(2, 97, (n,), generator=source).tolist(), params=params)
        for name, n in PROMPTS.items()
    ]
    found: dict[str, list[str | None]] = {name: ["", None] for name in PROMPTS}
    for one in requests[:-1]:
        engine.add(one)
    steps = 0
    while engine.has_work:
        steps += 1
        if steps == 7:
            engine.cancel("gone")
            engine.add(requests[-1])
        for delta in engine.step():
            found[delta.request_id][0] += delta.text
            found[delta.request_id][1] = delta.finish_reason
    return found


def step(nodes: list[tuple[int, int, int, int]], **lists: object) -> StepInput:
    columns = [torch.tensor([node[i] for node in nodes], dtype=torch.int64) for i in range(4)]
    flag = torch.ones(len(nodes), dtype=torch.bool)
    return StepInput(*columns, flag, torch.zeros_like(columns[0]), flag, **lists)


def tree(runner: Runner) -> list[torch.Tensor]:
    """A prompt, a tree behind it, and the step after one path of it was kept; then the row is given back."""
    steps = [
        step([(5 + i, i, 0, i - 1) for i in range(9)], reserves=((0, 64),)),
        step([(5, 9, 0, -1), (6, 9, 0, -1), (7, 10, 0, 0), (8, 10, 0, 0)], commits=tuple(range(9))),
        step([(9, 11, 0, -1)], commits=(0, 3)),
        step([], releases=(0,)),
    ]
    return [runner.forward(one).logits_WV for one in steps]


def whole(model: Path) -> Runner:
    shape = checkpoint.shape_of(model)
    return StageSettings(model=str(model), first=0, last=shape.layers, **SETTINGS).runner()


def pids(group: ShardGroup) -> list[int]:
    return ray.get([shard.__ray_call__.remote(lambda _: os.getpid()) for shard in group._shards])


def gone(processes: list[int], within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in processes):
            return True
        time.sleep(0.05)
    return False


def placed() -> int:
    """Placement groups that are not removed."""
    return sum(one["state"] != "REMOVED" for one in placement_group_table().values())


def equality(group: ShardGroup, model: Path) -> dict[str, object]:
    local = whole(model)
    return {
        "plan": group.describe()["plan"],
        "fingerprints_differ": group.fingerprint != local.fingerprint,
        "bytes_per_slot": [group.capacity.bytes_per_slot, local.capacity.bytes_per_slot],
        "texts": texts(group),
        "local_texts": texts(local),
        "tree": all(torch.equal(a, b) for a, b in zip(tree(group), tree(local), strict=True)),
        "bad_step": told(lambda: group.forward(step([(5, 0, 3, -1)]))),
        "again": texts(group),
    }


def llama(model: Path) -> dict[str, object]:
    with ShardGroup(str(model), 2, **SETTINGS) as group:
        processes = pids(group)
        found = equality(group, model) | {"failures": failures(group)}
    return found | {"gone": gone(processes), "placed": placed(), "closed": told(lambda: tree(group))}


def failures(group: ShardGroup) -> dict[str, object]:
    """A step fails in the shard, then one in rank 0; after each the group goes on."""
    prompt = step([(5 + i, i, 0, i - 1) for i in range(9)], reserves=((0, 64),))
    before = tree(group)
    ray.get(group._shards[0].__ray_call__.remote(fails_once))
    found: dict[str, object] = {
        "shard": told(lambda: group.forward(prompt)),
        "commit": told(lambda: group.forward(step([], commits=(0,)))),
    }
    group.forward(step([], releases=(0,)))
    equal = [tree(group)]
    compute = group._runner.compute
    group._runner.compute = broken  # type: ignore[method-assign, assignment]
    found["own"] = told(lambda: group.forward(prompt))
    group._runner.compute = compute  # type: ignore[method-assign]
    group.forward(step([], releases=(0,)))
    equal.append(tree(group))
    same = [torch.equal(a, b) for after in equal for a, b in zip(before, after, strict=True)]
    return found | {"equal": all(same)}


def broken(*_: object) -> torch.Tensor:
    raise ValueError("broken on purpose")


def fails_once(shard: actors.shard.Shard) -> None:
    runner = shard._runner
    assert runner is not None
    compute = runner.compute

    def once(*_: object) -> torch.Tensor:
        runner.compute = compute  # type: ignore[method-assign]
        raise MemoryError("no more extents")

    runner.compute = once  # type: ignore[method-assign, assignment]


def opt(model: Path) -> dict[str, object]:
    """Three stages, the last of which is killed between two steps."""
    with ShardGroup(str(model), 3, **SETTINGS) as group:
        found = equality(group, model)
        processes = pids(group)
        os.kill(processes[1], signal.SIGKILL)
        found |= lost(group)
    group.close()
    return found | {"gone": gone(processes), "placed": placed()}


def silent(model: Path) -> dict[str, object]:
    """Longer without a step than the time-out; then a shard that does not answer any more."""
    with ShardGroup(str(model), 2, timeout_s=2.0, **SETTINGS) as group:
        time.sleep(3)
        found: dict[str, object] = {"after": len(tree(group))}
        processes = pids(group)
        os.kill(processes[0], signal.SIGSTOP)
        found |= lost(group)
    return found | {"gone": gone(processes), "placed": placed()}


def lost(group: ShardGroup) -> dict[str, object]:
    started = time.monotonic()
    first = told(lambda: tree(group))
    seconds = time.monotonic() - started
    return {"first": first, "seconds": seconds, "second": told(lambda: tree(group))}


def told(call) -> str:
    try:
        call()
    except (AxiconError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def refusals(model: Path) -> dict[str, object]:
    def start(stages: int | Plan = 2, **settings: object) -> str:
        return told(lambda: ShardGroup(str(model), stages, **(SETTINGS | settings)))

    uneven = Plan((Stage(0, 1), Stage(1, 3)))
    found: dict[str, object] = {
        "free": int(ray.available_resources()["CPU"]),
        "room": start(threads=64, start_timeout_s=1.0),
        "stages": start(4),
        "plan": start(Plan((Stage(0, 1), Stage(1, 2)))),
        # Enough for one block's keys and values of a short request, not for those of two blocks.
        "cache": start(uneven, kv_bytes=20_000),
    }
    with patched(actors.shard, "__version__", "0.0.0"):
        found["version"] = start()
    with patched(checkpoint, "digest", lambda _: "another"):
        found["digest"] = start()
    return found | {"placed": placed()}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ray.init(log_to_driver=False, logging_level="ERROR")
    found = {
        "llama": llama(folder / "llama"),
        "opt": opt(folder / "opt"),
        "silent": silent(folder / "llama"),
        "refused": refusals(folder / "llama"),
    }
    ray.shutdown()
    print()  # Ray writes here too
    print(json.dumps(found))


if __name__ == "__main__":
    main()
