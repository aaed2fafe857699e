"""`axicon up`, `status`, `deploy` and `down` as a person runs them, on the cluster of this session.

That nothing of the cluster is left after `axicon down` is checked where the session ends it (conftest.py).
"""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs import reaper
from jobs.address import is_loopback
from jobs.cluster import free_ports
from jobs.deploy import reason
from tests.cluster import TestCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def state(cluster: TestCluster, name: str | None = None) -> dict[str, Any]:
    path = Path(cluster.env["AXICON_STATE"]) / "clusters" / f"{name or cluster.name}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return json.loads(path.read_text())


def processes(pid: int) -> list[psutil.Process]:
    holder = psutil.Process(pid)
    return [holder, *holder.children(recursive=True)]


def open_to_others(pid: int) -> list[str]:
    """Where processes beneath this one listen beyond loopback."""
    ours = {process.pid for process in processes(pid)}
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours]
    assert len(listening) > 5
    return [str(c.laddr) for c in listening if not is_loopback(c.laddr.ip)]


def test_the_state_file_says_where_the_cluster_is_and_holds_no_secret(cluster: TestCluster) -> None:
    found = state(cluster)
    assert found["dashboard"] == cluster.dashboard
    assert Path(found["token_path"]).parent == Path(found["folder"])
    assert psutil.Process(found["pid"]).is_running()
    assert Path(cluster.token_path).read_text() not in json.dumps(found)
    assert stat.S_IMODE(Path(found["folder"]).stat().st_mode) == 0o700


def test_up_again_finds_it_and_another_file_of_the_same_name_is_refused(
    cluster: TestCluster, tmp_path: Path
) -> None:
    again = cluster.axicon("up", str(cluster.file), "--name", cluster.name)
    assert again.stdout.startswith(f"{cluster.name} is running already")
    other = tmp_path / "other.yaml"
    other.write_text(cluster.file.read_text())
    refused = cluster.axicon("up", str(other), "--name", cluster.name, check=False)
    assert refused.returncode == 2
    assert f"is running from {cluster.file}" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_its_nodes_are_those_of_the_node_table(cluster: TestCluster) -> None:
    nodes = json.loads(cluster.axicon("status", cluster.name, "--json").stdout)["nodes"]
    assert [(node["type"], node["head"], node["alive"]) for node in nodes] == [
        ("head", True, True),
        ("cpu", False, True),
        ("gpu", False, True),
    ]
    table = yaml.safe_load(cluster.file.read_text())["available_node_types"]
    for node in nodes:
        row = table[node["type"]]
        assert node["labels"] == row["labels"]
        assert node["resources"] == {name: count for name, count in row["resources"].items() if count}


def test_a_wrong_token_and_a_missing_cluster_are_one_line(cluster: TestCluster) -> None:
    for words, env, says in (
        (("status", f"address={cluster.dashboard}"), {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
        (("deploy", f"address={cluster.dashboard}"), {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
        (("status", "nobody"), {}, "no cluster nobody is running here; running here: axicon-tests"),
        (("deploy", "name=nobody"), {}, "no cluster nobody is running here"),
        (("down", "nobody"), {}, "no cluster nobody is running here"),
        (("status", f"address=http://127.0.0.1:{free_ports(1)[0]}"), {}, "no cluster answers at"),
    ):
        done = cluster.axicon(*words, check=False, **env)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


def ask(cluster: TestCluster, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{cluster.serve_port}{path}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def served(cluster: TestCluster) -> str:
    return ask(cluster, "/v1/models")["data"][0]["id"]


@pytest.fixture(scope="module")
def deployed(cluster: TestCluster) -> subprocess.CompletedProcess[str]:
    return cluster.axicon("deploy", f"name={cluster.name}")


def test_deploy_ends_when_the_application_answers(
    cluster: TestCluster, deployed: subprocess.CompletedProcess[str]
) -> None:
    assert "generate: running, Generator 1 of 1 replicas run" in deployed.stderr
    assert "INFO" not in deployed.stderr
    assert f"generate answers at http://127.0.0.1:{cluster.serve_port}   try: curl" in deployed.stdout
    assert served(cluster) == "tiny"
    answer = ask(cluster, "/v1/completions", {"prompt": "abc", "max_tokens": 4})
    assert answer["usage"]["completion_tokens"] == 4
    found = json.loads(cluster.axicon("status", cluster.name, "--json").stdout)
    [application] = found["applications"]
    assert (application["status"], application["replicas"]) == ("RUNNING", ["RUNNING"])
    assert found["serve"] == f"127.0.0.1:{cluster.serve_port}"


def test_the_flags_of_the_file_are_in_effect_and_nothing_is_open_to_others(
    cluster: TestCluster, deployed: object
) -> None:
    pid = state(cluster)["pid"]
    proxies = [process for process in processes(pid) if process.name() == "haproxy"]
    assert proxies, "RAY_SERVE_ENABLE_HA_PROXY has no effect"
    assert open_to_others(pid) == []


def changed(cluster: TestCluster, folder: Path, **args: Any) -> str:
    """The cluster.yaml with other arguments for its application."""
    content = yaml.safe_load(cluster.file.read_text())
    content["metadata"]["serve"]["applications"][0]["args"] |= args
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@contextlib.contextmanager
def asked_all_the_time(cluster: TestCluster) -> Iterator[list[str]]:
    """Requests, one after another, for the time of the block; what went wrong is collected."""
    failures: list[str] = []
    done = threading.Event()

    def asking() -> None:
        while not done.wait(0.05):
            try:
                served(cluster)
            except OSError as error:
                failures.append(str(error))

    thread = threading.Thread(target=asking)
    thread.start()
    try:
        yield failures
    finally:
        done.set()
        thread.join()


def test_a_deploy_that_fails_says_why_and_leaves_the_old_one_answering(
    cluster: TestCluster, deployed: object, tmp_path: Path
) -> None:
    broken = changed(cluster, tmp_path, model=str(tmp_path / "none"))
    done = cluster.axicon("deploy", broken, f"name={cluster.name}", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("axicon: generate: DEPLOY_FAILED: ")
    assert str(tmp_path / "none") in done.stderr.splitlines()[-1]
    assert served(cluster) == "tiny"


def test_a_second_deploy_changes_what_is_served_while_it_answers(
    cluster: TestCluster, deployed: object, tmp_path: Path
) -> None:
    with asked_all_the_time(cluster) as failures:
        cluster.axicon("deploy", changed(cluster, tmp_path, served_name="two"), f"name={cluster.name}")
    assert served(cluster) == "two"
    assert failures == []


def test_deploy_refuses_to_listen_beyond_loopback_without_keys(cluster: TestCluster) -> None:
    [port] = free_ports(1)
    refused = cluster.axicon("deploy", f"name={cluster.name}", "host=0.0.0.0", f"port={port}", check=False)
    assert refused.returncode == 2
    assert "AXICON_API_KEYS" in refused.stderr


def open_without_keys(dashboard: str, headers: dict[str, str]) -> str:
    """What becomes of a keyless application on every interface, put there past `axicon deploy`."""
    url = f"{dashboard}/api/serve/applications/"
    application = {"name": "generate", "import_path": "services.app:build", "args": {"model": "demo"}}
    http = {"host": "0.0.0.0", "port": free_ports(1)[0]}
    config = {"http_options": http, "proxy_location": "HeadOnly", "applications": [application]}
    body, kind = json.dumps(config).encode(), {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers | kind, method="PUT")).close()
    for _ in range(200):
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            found = json.load(answer)["applications"]["generate"]
        if found["status"] != "DEPLOYING":
            break
        time.sleep(0.2)
    return f"{found['status']}: {reason(found)}"


def test_another_cluster_refuses_to_be_open_and_a_killed_holder_takes_it_along(cluster: TestCluster) -> None:
    cluster.axicon("up", str(cluster.file), "--nodes", "local", "--name", "other")
    found = state(cluster, "other")
    [node] = json.loads(cluster.axicon("status", "other", "--json").stdout)["nodes"]
    assert (node["type"], node["resources"]) == ("local", {"CPU": 4.0})
    assert "name one of axicon-tests, other" in cluster.axicon("status", check=False).stderr
    token = Path(found["token_path"]).read_text()
    outcome = open_without_keys(found["dashboard"], {"Authorization": f"Bearer {token}"})
    assert outcome.startswith("DEPLOY_FAILED: Serve listens on 0.0.0.0, where others reach it")
    ours = processes(found["pid"])
    psutil.Process(found["pid"]).kill()
    assert reaper.still_running(ours, 30) == []
    assert not Path(found["folder"]).exists()
    assert "no cluster other is running here" in cluster.axicon("down", "other", check=False).stderr
    assert not (Path(cluster.env["AXICON_STATE"]) / "clusters" / "other.json").exists()
    assert json.loads(cluster.axicon("status", "--json").stdout)["name"] == cluster.name


def test_the_code_of_an_application_stays_on_the_cluster(cluster: TestCluster, deployed: object) -> None:
    """A node that joins later needs it; without the pin Ray has removed it by now."""
    code = (
        "import sys, time; from ray._raylet import GcsClient\n"
        "client = GcsClient(address=sys.argv[1])\n"
        "[print(key.decode()) for key in client.internal_kv_keys(b'gcs://', None)]"
    )
    url = f"{cluster.dashboard}/api/serve/applications/"
    with urllib.request.urlopen(urllib.request.Request(url, headers=cluster.headers)) as answer:
        application = json.load(answer)["applications"]["generate"]
    uri = application["deployed_app_config"]["runtime_env"]["working_dir"]
    time.sleep(max(0.0, application["last_deployed_time_s"] + 22 - time.time()))
    command = [sys.executable, "-c", code, state(cluster)["gcs"]]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=True)
    assert uri in done.stdout.splitlines()
