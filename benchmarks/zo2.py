"""Time per step and memory of finetuning a model whose blocks lie in a file, beside the same run in memory.

    python benchmarks/random_model.py opt-1.3b DIR
    python benchmarks/zo2.py DIR [--batch 8] [--tokens 64] [--steps 2]

Each run is a process of its own: `zo_sgd` in memory, then `zo2` with three buffers and a file. Both say
their time per step, their largest resident set beyond what the libraries take, and a digest of losses and
weights, which must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from axicon.data.batch import Batch
from axicon.finetune.blockstore import FileStore
from axicon.finetune.estimate import trained
from axicon.finetune.footprint import predict
from axicon.finetune.loop import digest
from axicon.finetune.objectives.language import Language
from axicon.finetune.offload import ring_of
from axicon.finetune.offloaded import Streamed, load_offloaded
from axicon.finetune.shards import Alone
from axicon.finetune.updates.zo2 import ZO2
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.model import checkpoint
from axicon.model.adapters import Full
from axicon.protocols import Moment

GB = 1e9


def one_run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    settings: dict[str, Any] = {"lr": 1e-6, "eps": 1e-3}
    shape = checkpoint.shape_of(args.model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    rule: ZoSGD
    if args.kind == "zo2":
        rule = ZO2(**settings, write_every=args.write_every)
        model = load_offloaded(args.model, FileStore(folder), write_every=args.write_every)
    else:
        rule = ZoSGD(**settings)
        model = checkpoint.load(args.model, dtype=torch.float32)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Full().install(model, lambda *_: 0)
    rule.prepare(model)
    generator = torch.Generator().manual_seed(0)
    losses, times = [], []
    for step in range(args.steps + 1):
        ids = torch.randint(0, shape.vocab, (args.batch, args.tokens), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        batch = Batch(input_ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), labels=labels)
        at, began = Moment(step, 0), time.perf_counter()
        scalars = rule.measure(model, Language(), batch, Alone(), at)
        rule.apply(model, scalars, at)
        times.append(time.perf_counter() - began)
        losses.append(dict(scalars))
        print(f"  {args.kind} step {step}: {times[-1]:.2f} s, loss {scalars['loss']:.6f}", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ring = ring_of(model)
    weights = sum(p.numel() * 4 for p in checkpoint_parameters(shape))
    found: dict[str, Any] = {
        "kind": args.kind,
        "seconds_per_step": sum(times[1:]) / args.steps,
        "peak_of_loading_gb": (loaded - before) * 1024 / GB,
        "peak_beyond_libraries_gb": (peak - before) * 1024 / GB,
        "weights_gb": weights / GB,
        "losses": hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16],
    }
    if ring is not None:
        resident = ring.ring_bytes + sum(p.numel() * 4 for p in ring.resident().values())
        found |= {
            "resident_share": resident / weights,
            "waited_share": ring.traffic.waited / sum(times),
            "gb_in_per_step": ring.traffic.bytes_in / GB / (args.steps + 1),
            "gb_out_per_step": ring.traffic.bytes_out / GB / (args.steps + 1),
        }
    if args.digest:
        held = trained(model)
        found["weights"] = digest(held if ring is None else Streamed(model, held))[:16]
    return found


def checkpoint_parameters(shape: Any) -> list[torch.Tensor]:
    from axicon.model.decoder import Decoder

    with torch.device("meta"):
        return list(Decoder(shape).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write-every", type=int, default=8)
    parser.add_argument(
        "--folder", default=None, help="where the blocks lie; none: the folder for temporary files"
    )
    parser.add_argument("--digest", action="store_true", help="compare the weights too")
    parser.add_argument("--kind", choices=["zo_sgd", "zo2"], help="one of the runs; none: both, compared")
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(one_run(args)))
        return
    found = []
    for kind in ("zo_sgd", "zo2"):
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(json.dumps(found[-1], indent=1))
    memory, ring = found
    ratio = ring["seconds_per_step"] / memory["seconds_per_step"]
    same = all(memory.get(key) == ring.get(key) for key in ("losses", "weights"))
    print(
        f"time per step {ratio:.2f} x that in memory, {ring['resident_share']:.1%} of the weights resident, ",
        end="",
    )
    print("bits equal" if same else "BITS DIFFER")
    print(
        predict(checkpoint.shape_of(args.model), batch=args.batch, tokens=args.tokens, itemsize=4).describe()
    )


if __name__ == "__main__":
    main()
