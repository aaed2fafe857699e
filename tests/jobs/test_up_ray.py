"""`axicon up`, `status` and `down` as a person runs them, on the cluster of this session."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import psutil
import pytest

from jobs.address import is_loopback
from tests.jobs.conftest import TestCluster

pytestmark = pytest.mark.ray


def state(cluster: TestCluster) -> Path:
    return Path(cluster.env["AXICON_STATE"]) / "clusters" / f"{cluster.name}.json"


def test_the_state_file_is_for_this_user_alone_and_says_where_the_cluster_is(cluster: TestCluster) -> None:
    path = state(cluster)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = json.loads(path.read_text())
    assert content["dashboard"] == cluster.dashboard
    assert Path(content["token_path"]).parent == Path(content["folder"])
    assert psutil.Process(content["pid"]).is_running()
    assert "token" not in content


def test_nothing_of_it_can_be_reached_from_other_machines(cluster: TestCluster) -> None:
    holder = psutil.Process(json.loads(state(cluster).read_text())["pid"])
    ours = {holder.pid, *(process.pid for process in holder.children(recursive=True))}
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours]
    assert len(listening) > 5
    assert [str(c.laddr) for c in listening if not is_loopback(c.laddr.ip)] == []


def test_up_again_finds_it_and_another_file_of_the_same_name_is_refused(
    cluster: TestCluster, tmp_path: Path
) -> None:
    again = cluster.axicon("up", str(cluster.file), f"name={cluster.name}")
    assert again.stdout.startswith(f"{cluster.name} is running already")
    other = tmp_path / "other.yaml"
    other.write_text(cluster.file.read_text())
    refused = cluster.axicon("up", str(other), f"name={cluster.name}", check=False)
    assert refused.returncode == 2
    assert f"is running from {cluster.file}" in refused.stderr
    assert refused.stderr.count("\n") == 1
