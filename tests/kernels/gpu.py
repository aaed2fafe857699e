"""Triton kernels without a GPU: in the interpreter, and through the compiler of real ones."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

Run = Callable[..., Tensor]


@contextmanager
def interpreter() -> Iterator[Run]:
    """Calls functions with their arguments in a process of its own, where Triton interprets its kernels. That
    has to be switched on before Triton is imported, so no other test meets it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()  # starts the process while the variable is set
    with pool:
        yield lambda function, *given: pool.submit(function, *given).result(60)


def skip_bfloat16(request: pytest.FixtureRequest) -> None:
    """For `tl.dot`: the interpreter multiplies numbers of that dtype as if their bits were integers."""
    if request.node.callspec.params["product"] == "interpreter":
        pytest.skip("Triton's interpreter has no products of bfloat16")


def on_gpu(function: Callable[..., Tensor], *given: object) -> Tensor:
    return function(*(one.cuda() if isinstance(one, Tensor) else one for one in given)).cpu()


def compiled(
    kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any],
    most_shared: int = 163 << 10, **options: int,
) -> str:  # fmt: skip
    """The PTX of a kernel that went through the assembler, which comes with Triton. What is neither a pointer
    nor a constant is an int32. most_shared: bytes of shared memory that it may want.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
        for name in names
    }
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]] for n in names
        if n in pointers or "stride" in n or n == "outputs"
    }  # fmt: skip
    source = triton.compiler.ASTSource(
        kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False, **options})
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared <= most_shared
    return str(made.asm["ptx"])
