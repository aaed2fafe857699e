from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import gpu


@pytest.fixture(scope="session")
def interpreter() -> Iterator[gpu.Run]:
    """One process for all files: its start takes longer than most tests."""
    with gpu.interpreter() as run:
        yield run
