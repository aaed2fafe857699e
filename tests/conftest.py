"""What every test runs under. Set before anything imports Ray or torch, because both read it at import."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

pytest_plugins = ["tests.cluster"]

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, and no test fails because the machine was busy.
hypothesis.settings.register_profile(
    "axicon", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("axicon")

RAY_TMPDIR = tempfile.mkdtemp(prefix="ax-")
"""Private, so that no other Ray is found or disturbed; short, because socket paths are limited."""

os.environ |= {
    "RAY_TMPDIR": RAY_TMPDIR,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "axicon-tests",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Kept between runs, so that the embedded model is converted once and not in every run.
os.environ.setdefault("AXICON_CACHE", str(ROOT / ".cache"))


def pytest_unconfigure() -> None:
    shutil.rmtree(RAY_TMPDIR, ignore_errors=True)
    # Triton, which transformers imports, lists its leaks when the interpreter ends, after pytest's last line.
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In several processes, one has all that starts Ray, whose clusters are made once a session; the rest
    goes file by file.
    """
    from xdist.scheduler import LoadFileScheduling

    class RayTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if file.endswith("_ray.py") else file

    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray takes longest, so that comes first."""
    items.sort(key=lambda item: not item.path.name.endswith("_ray.py"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public data sets: the folder in AXICON_DATA, or `shared/data` beside the repository."""
    path = Path(os.environ.get("AXICON_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}: name their folder in AXICON_DATA")
    return path


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone, but for the compiled kernels, which take a quarter of a minute."""
    kernels = Path(os.environ["AXICON_CACHE"]) / "kernels"
    kernels.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("AXICON_CACHE", str(folder))
    return folder


@pytest.fixture
def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that connects to another machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        # A datagram socket "connects" without sending anything; Ray asks for its own address that way.
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM:
            host = str(address[0]) if isinstance(address, tuple) else ""
            if host not in ("127.0.0.1", "::1", "localhost"):
                pytest.fail(f"a test tried to connect to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module", autouse=True)
def _only_new_garbage() -> None:
    """What a process has imported is not looked through again whenever a test returns memory: hundreds of
    thousands of objects, a fifth of a second each time.
    """
    from axicon.model.machine import leave_alone

    leave_alone()
