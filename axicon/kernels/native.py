"""The C++ kernels of `cpu/`: compiled once per machine, cached, called through ctypes.

They use no header of torch and touch nothing but the pointers they are given, so the compiler is called
directly: two to four seconds, no build system, and nothing to go stale when torch changes. The library links
the OpenMP runtime by the name under which torch has already loaded it, so both share one pool of threads.

The kernels need AVX-512 with VNNI, or AVX2, which serves them with half the width. Elsewhere `library()`
raises `Unavailable` with the reason, and the caller says which torch path it takes instead. The environment
variable AXICON_INSTRUCTIONS=avx2 asks for the narrow ones where there are wide ones too.
"""

from __future__ import annotations

import ctypes as c
import functools
import hashlib
import logging
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger("axicon")

WIDE_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
NARROW_FLAGS = frozenset({"avx2", "fma", "f16c"})
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
SOURCES = Path(__file__).with_name("cpu")

P, I32, F32 = c.c_void_p, c.c_int32, c.c_float
Library = c.CDLL


class Unavailable(RuntimeError):
    """Why the kernels cannot run here, in one line."""


class Linear(c.Structure):
    """`axicon::Linear` of linear.h."""

    _fields_ = (
        ("format", I32), ("outputs", I32), ("inputs", I32), ("threshold", F32), ("relative", F32),
        ("weight", P), ("scale", P), ("bias", P),
        ("group", I32), ("middle", I32), ("scale_type", I32), ("zeros", I32), ("order", P),
        ("start", P),
    )  # fmt: skip


class Norm(c.Structure):
    _fields_ = (("weight", P), ("bias", P), ("epsilon", F32), ("width", I32))


class Block(c.Structure):
    _fields_ = (
        ("before_attention", Norm), ("before_mlp", Norm), ("query", Norm), ("key", Norm),
        ("qkv", Linear), ("out", Linear), ("up", Linear), ("down", Linear),
        ("attention_shortcut", Linear), ("mlp_shortcut", Linear), ("window", I32), ("scale", F32),
    )  # fmt: skip


class Model(c.Structure):
    _fields_ = (
        ("blocks", I32), ("width", I32), ("heads", I32), ("kv_heads", I32), ("head_width", I32),
        ("hidden", I32), ("norm", I32), ("activation", I32), ("position_offset", I32),
        ("embedding_width", I32), ("position_width", I32), ("embedding", P), ("positions", P),
        ("frequencies", P), ("block", P), ("final_norm", Norm), ("project_in", Linear), ("head", Linear),
    )  # fmt: skip


class Extent(c.Structure):
    _fields_ = (
        ("keys", P), ("values", P), ("lengths", P), ("positions", P), ("tally", P), ("capacity", I32),
        ("entries", I32), ("stride", I32), ("every", I32),
    )  # fmt: skip


class Evicted(c.Structure):
    """`axicon::Evicted` of evict.h."""

    _fields_ = (
        ("keys", P), ("values", P), ("positions", P), ("lengths", P), ("scores", P), ("sums", P),
        ("capacity", I32), ("score_stride", I32), ("sum_stride", I32), ("budget", I32), ("recent", I32),
        ("sinks", I32),
    )  # fmt: skip


class Step(c.Structure):
    _fields_ = (
        ("rows", I32), ("wanted", I32), ("tree_words", I32), ("threads", I32), ("tokens", P),
        ("positions", P),
        ("request", P), ("offset", P), ("committed", P), ("requests", I32), ("reserved", I32), ("extents", P),
        ("hidden", P), ("wanted_rows", P), ("logits", P), ("first", I32), ("last", I32), ("stream", P),
        ("adapters", P), ("most_low", I32), ("reserved2", I32),
    )  # fmt: skip


class Pair(c.Structure):
    """`axicon::Pair` of lowrank.h."""

    _fields_ = (
        ("a", P), ("b", P), ("rank", I32), ("first", I32), ("outputs", I32), ("inputs", I32),
    )  # fmt: skip


class Adapter(c.Structure):
    """`axicon::Adapter` of lowrank.h: low-rank additions to the products of one block."""

    _fields_ = tuple((name, Pair * 3) for name in ("qkv", "out", "up", "down"))


BF16, INT8, GROUP4, GROUP8, SPARSE = range(5)
LANES = 16
"""Outputs that packed weights keep together."""
SCALE_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
RMS_NORM, LAYER_NORM = 0, 1
ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
HEAD_WIDTHS = (32, 64, 96, 128)


@functools.cache
def library() -> Library:
    """The compiled kernels, built now if this machine has none yet. Raises `Unavailable`."""
    compiler, path = library_file()
    if not path.exists():
        _build(compiler, path)
    lib = c.CDLL(str(path))
    for name, arguments in {
        "axicon_pack_int8": (P, I32, I32, P),
        "axicon_pack_bf16": (P, I32, I32, P),
        "axicon_pack_groups": (P, I32, I32, I32, P),
        "axicon_linear": (P, P, I32, P, I32),
        "axicon_buffers_delete": (P,),
        "axicon_seconds": (P, P),
        "axicon_step": (P, P, P),
        "axicon_evict": (P, I32, I32, I32, I32),
        "axicon_softmax": (P, P, I32, I32, P, P, I32),
        "axicon_truncate": (P, I32, I32, P, I32),
        "axicon_draw": (P, P, I32, I32, c.c_int64, P, P, I32),
        "axicon_philox": (c.c_uint64, c.c_uint32, c.c_int64, c.c_int64, P),
        "axicon_add_signs": (
            P, P, c.c_int64, c.c_int64, P, F32, F32, c.c_uint64, c.c_uint32, I32, I32,
        ),
    }.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = None
    lib.axicon_buffers_new.restype = P
    return lib


def library_file() -> tuple[str, Path]:
    """The compiler, and where its library lies for this source and processor, built or not.

    Raises `Unavailable`.
    """
    missing = NARROW_FLAGS - cpu_flags()
    if missing and instructions() != "AVX-512":
        raise Unavailable(f"the processor lacks {', '.join(sorted(missing))}")
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("no C++ compiler: install g++ or set CXX")
    return compiler, _cache() / f"kernels-{_key(compiler)}.so"


def instructions() -> str:
    """What the kernels are compiled for here, in words."""
    wide = cpu_flags() >= WIDE_FLAGS and os.environ.get("AXICON_INSTRUCTIONS", "").lower() != "avx2"
    return "AVX-512" if wide else "AVX2"


def version() -> str | None:
    """Name of the compiled kernels, which source, compiler, flags and processor decide; None without them."""
    return None if why_unavailable() else Path(library()._name).stem


def why_unavailable() -> str | None:
    """The reason the kernels cannot run on this machine, or None."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


def large_pages(size: int) -> torch.Tensor:
    """uint8 (size,), on pages of 2 MiB where the system grants them: fewer misses when all of it is
    streamed.
    """
    page = 2 << 20
    whole = torch.empty(size + page, dtype=torch.uint8)
    start = -whole.data_ptr() % page
    if hasattr(mmap, "MADV_HUGEPAGE"):
        length = size // page * page
        advise = c.CDLL(None).madvise
        advise.argtypes = (P, c.c_size_t, c.c_int)
        advise(whole.data_ptr() + start, length, mmap.MADV_HUGEPAGE)  # a wish: refused, nothing is lost
    return whole[start : start + size]


def cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _cache() -> Path:
    """`kernels` in axicon's cache folder, for this user alone: code lies in it."""
    base = os.environ.get("AXICON_CACHE")
    general = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(base) if base else general / "axicon"
    folder = root / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise Unavailable(f"{folder} belongs to another user: set AXICON_CACHE to a folder of your own")
    return folder


def _flags() -> tuple[str, ...]:
    return COMPILER_FLAGS if instructions() == "AVX-512" else (*COMPILER_FLAGS, "-mno-avx512f")


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(version + " ".join(_flags()).encode() + " ".join(sorted(cpu_flags())).encode())
    return digest.hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    log.info("compiling the CPU kernels with %s, once per machine", compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_flags(), "-o", str(made), str(SOURCES / "step.cpp")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler} took more than 300 s") from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise Unavailable(f"{compiler} failed: {error}")
        os.replace(made, path)
