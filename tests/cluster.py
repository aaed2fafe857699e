"""One simulated cluster for all tests of a session that need one, started as a person starts it.

This process never imports Ray for it: a test uses the command line, REST, or a client in a subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs import cluster_file, reaper, running
from jobs.cluster import free_ports

ROOT = Path(__file__).resolve().parent.parent
AXICON = Path(sysconfig.get_path("scripts")) / "axicon"
NAME = "axicon-tests"


@dataclass(frozen=True)
class TestCluster:
    """A cluster that runs: head without CPUs, a node with CPUs, and one with a GPU that is only a number."""

    __test__ = False

    name: str
    dashboard: str
    """URL for `JobSubmissionClient`, `--address` and REST."""
    token_path: str
    file: Path
    """Its cluster.yaml; `metadata.serve` serves a tiny random model on a free port."""
    serve_port: int
    storage: Path
    env: dict[str, str]
    """Environment of a subprocess that works with it: `axicon`, `ray job submit`, or a client of Ray's."""

    def axicon(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """`axicon WORDS` beside this cluster, with what it says."""
        done = subprocess.run(
            [str(AXICON), *words], cwd=ROOT, env=self.env | env, capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    @property
    def headers(self) -> dict[str, str]:
        """Of a REST request to the dashboard."""
        return {"Authorization": f"Bearer {Path(self.token_path).read_text()}"}


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a person's shell: nothing of what this session has set for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST"))}
    return kept | more


def small_file(folder: Path, port: int) -> Path:
    """A cluster.yaml like the shipped one, with three nodes and a tiny model in its Serve application."""
    from tests.services.tiny import tiny_model  # torch, which most tests of this session may not need

    content: dict[str, Any] = yaml.safe_load(cluster_file.shipped().read_text())
    content["available_node_types"]["gpu"]["min_workers"] = 1
    content["metadata"]["local"] |= {"object_store_mib": 80, "storage_path": str(folder / "storage")}
    serve = content["metadata"]["serve"]
    serve["http_options"]["port"] = port
    model = tiny_model(folder / "tiny", positions=512)
    serve["applications"][0]["args"] |= {
        "model": str(model), "dtype": "float32", "threads": 1, "kv_gib": 0.1, "max_rows": 4
    }  # fmt: skip
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """The cluster of this session. Jobs leave it as it was; who deploys leaves what others may use."""
    folder = tmp_path_factory.mktemp("cluster")
    port, dashboard = free_ports(2)
    file = small_file(folder, port)
    # So short, what Ray would remove after ten minutes is gone while tests look.
    short = {"RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S": "20"}
    env = clean_env(AXICON_STATE=str(folder / "state"), **short)
    command = [str(AXICON), "up", str(file), f"name={NAME}", f"dashboard_port={dashboard}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXICON_STATE", env["AXICON_STATE"])
        found = running.find(NAME)
    try:
        yield TestCluster(
            name=NAME,
            dashboard=found.dashboard,
            token_path=found.token_path,
            file=file,
            serve_port=port,
            storage=Path(found.storage),
            env=env | found.env(),
        )
    finally:
        holder = psutil.Process(found.pid)
        ours = [holder, *holder.children(recursive=True)]
        done = subprocess.run([str(AXICON), "down", NAME], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [process for process in ours if reaper.runs(process)] == []
        assert reaper.users_of(Path(found.folder), spared=set()) == []
        assert not Path(found.folder).exists()
