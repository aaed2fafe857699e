"""The code that goes to a cluster: the four packages as they are here, from a checkout or from a wheel."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("axicon", "actors", "services", "jobs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")


@contextlib.contextmanager
def packages() -> Iterator[Path]:
    """A folder with the packages, for the time of the block. Equal code makes equal uploads."""
    source = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="axicon-") as folder:
        for name in PACKAGES:
            shutil.copytree(source / name, Path(folder) / name, ignore=LEFT_OUT)
        yield Path(folder)
