"""`axicon up` and `axicon status` as far as they go without Ray."""

from __future__ import annotations

import fcntl
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from axicon.errors import AxiconError, RunFailed
from jobs import cluster, cluster_file, holder, running, status, up
from jobs.dashboard import Dashboard
from jobs.progress import Reporter
from jobs.up import UpRecipe


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXICON_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "clusters"


def with_types(folder: Path, **least: int) -> cluster_file.ClusterFile:
    content: dict[str, Any] = yaml.safe_load(cluster_file.shipped().read_text())
    for name, count in least.items():
        content["available_node_types"][name]["min_workers"] = count
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return cluster_file.read(path)


def test_the_table_becomes_nodes(tmp_path: Path) -> None:
    head, workers = cluster.node_list(with_types(tmp_path, cpu=2, gpu=1), "table")
    assert (head.name, [node.name for node in workers]) == ("head", ["cpu", "cpu", "gpu"])
    head, workers = cluster.node_list(with_types(tmp_path, cpu=0), "table")
    assert [node.name for node in workers] == ["cpu"], "a cluster without a worker runs nothing"
    head, workers = cluster.node_list(cluster_file.read(), "local")
    assert (head.resources, workers) == ({"CPU": 4}, [])


def test_a_file_without_a_table_becomes_one_node(tmp_path: Path) -> None:
    content = yaml.safe_load(cluster_file.shipped().read_text())
    del content["available_node_types"], content["head_node_type"]
    content["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    head, workers = cluster.node_list(cluster_file.read(tmp_path / "cluster.yaml"), "table")
    assert (head.resources, workers) == ({"CPU": 4}, [])


def test_a_taken_dashboard_port_is_one_line_if_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AxiconError, match=f"dashboard_port={port} is in use"):
            up.run(UpRecipe(dashboard_port=port))


def test_without_one_it_is_the_usual_port_or_a_free_one(
    monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(up, "DASHBOARD_PORT", free_port)
    assert up.dashboard_port(None) == free_port
    with socket.create_server(("127.0.0.1", free_port)):
        assert up.dashboard_port(None) != free_port


def test_two_at_once_are_refused(state: Path) -> None:
    state.mkdir(parents=True)
    with (state / "axicon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AxiconError, match="axicon is being started or ended by another"):
            up.run(UpRecipe())


def test_what_the_holder_says_is_passed_on_until_it_is_ready() -> None:
    said = io.StringIO()
    lines = io.StringIO(f"node head runs\n{holder.READY}\nmore\n")
    assert up._follow(lines, Reporter(said))
    assert said.getvalue() == "node head runs\n"
    assert not up._follow(io.StringIO("node head runs\n"), Reporter(said))
    with pytest.raises(RunFailed, match="no memory"):
        up._follow(io.StringIO(f"{holder.FAILED}no memory\n"), Reporter(said))


def test_a_holder_that_cannot_start_tells_why(tmp_path: Path) -> None:
    recipe = UpRecipe(name="one")
    (tmp_path / "state" / "clusters").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"none\.yaml: cannot be read"):
        up._start_holder("one", tmp_path / "none.yaml", recipe, 1, Reporter(io.StringIO()))
    assert running.read("one") is None


def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    recipe = UpRecipe(name="one", ready_s=0.05)
    (tmp_path / "state" / "clusters").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"ready_s=0.05: one did not run in this time"):
        up._start_holder("one", cluster_file.shipped(), recipe, 1, Reporter(io.StringIO()))


class Jobs(Dashboard):
    """A cluster with jobs that end when they are told to, one look later."""

    def __init__(self, *running: str) -> None:
        super().__init__("http://127.0.0.1:1", "", "")
        states = dict.fromkeys(running, "RUNNING") | {"done": "SUCCEEDED"}
        object.__setattr__(self, "states", states)

    def get(self, path: str) -> Any:
        jobs = [{"submission_id": name, "status": state} for name, state in self.states.items()]
        for name, state in self.states.items():
            self.states[name] = "STOPPED" if state == "asked" else state
        return [{"submission_id": None, "status": "RUNNING"}, *jobs]

    def post(self, path: str) -> Any:
        name = path.removeprefix("/api/jobs/").removesuffix("/stop")
        if name != "deaf":
            self.states[name] = "asked"


def test_running_jobs_are_asked_to_end_first_and_not_waited_for_forever() -> None:
    said = io.StringIO()
    jobs = Jobs("one")
    up._stop_jobs(jobs, 5, Reporter(said))
    assert jobs.states == {"one": "STOPPED", "done": "SUCCEEDED"}
    assert said.getvalue() == "stopping the job one\n"
    deaf = Jobs("deaf")
    up._stop_jobs(deaf, 0.1, Reporter(said))
    assert deaf.states["deaf"] == "RUNNING"


def test_storage_here_is_a_folder_of_the_user_unless_the_file_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    file = cluster_file.read()
    assert holder.storage_path(file, "one") == "/data/axicon/one"
    content = yaml.safe_load(file.path.read_text())
    content["metadata"]["local"]["storage_path"] = "/scratch"
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    assert holder.storage_path(cluster_file.read(tmp_path / "cluster.yaml"), "one") == "/scratch"


NODE = {
    "node_ip": "127.0.0.1",
    "is_head_node": False,
    "state": "ALIVE",
    "state_message": None,
    "resources_total": {"CPU": 8.0, "node:127.0.0.1": 1.0, "memory": 1e9, "object_store_memory": 1e8},
    "labels": {"ray.io/node-id": "x", "ray.io/node-group": "cpu", "role": "worker"},
}
JOB = {
    "submission_id": "evaluate-1",
    "status": "FAILED",
    "entrypoint": "python -m jobs evaluate demo",
    "start_time": 1_000,
    "end_time": 4_000,
    "message": "first\nno such model",
}
ON_ITS_WAY = JOB | {
    "submission_id": "evaluate-2",
    "status": "RUNNING",
    "entrypoint": "exec python -m jobs evaluate demo",
    "end_time": None,
    "message": "Job is currently running.",
}


def test_a_status_is_tables_for_people_and_json_for_programs() -> None:
    dead = NODE | {"state": "DEAD", "state_message": "terminated"}
    found = status.Status(
        name="one",
        dashboard="http://127.0.0.1:1",
        storage="/data",
        serve=None,
        nodes=[status.node(NODE), status.node(dead)],
        applications=[],
        jobs=[status.job(JOB), status.job(ON_ITS_WAY)],
    )
    said = io.StringIO()
    status.show(found, Console(file=said, width=120))
    text = said.getvalue()
    for part in (
        "one at http://127.0.0.1:1, storage /data",
        "CPU 8",
        "role=worker",
        "alive",
        "dead terminated",
    ):
        assert part in text
    assert "no application; `axicon deploy` puts one there" in text
    assert [line.split() for line in text.splitlines() if "evaluate-1" in line] == [
        ["evaluate-1", "failed", "3", "python", "-m", "jobs", "evaluate", "demo", "no", "such", "model"]
    ]
    assert [line.split() for line in text.splitlines() if "evaluate-2" in line] == [
        ["evaluate-2", "running", "-", "python", "-m", "jobs", "evaluate", "demo", "-"]
    ]
    again = json.loads(status.as_json(found))
    assert again["nodes"][0]["resources"] == {"CPU": 8.0}
    assert again["nodes"][0]["labels"] == {"role": "worker"}
    assert again["jobs"][0]["seconds"] == 3.0


def test_an_application_that_does_not_run_says_why() -> None:
    entry = {
        "status": "DEPLOY_FAILED",
        "message": "",
        "deployments": {"G": {"replicas": [], "target_num_replicas": 1, "message": "AxiconError: no model"}},
    }
    assert status.application("generate", entry) == status.Application(
        "generate", "DEPLOY_FAILED", [], 1, "no model"
    )
