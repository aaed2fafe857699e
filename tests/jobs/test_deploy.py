"""`axicon deploy` before it reaches a cluster, and how it reads what Serve says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from axicon.errors import AxiconError
from jobs import cluster_file, deploy, upload
from jobs.deploy import DeployRecipe, configuration


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXICON_API_KEYS", raising=False)


def file_with(folder: Path, **args: Any) -> cluster_file.ClusterFile:
    """The shipped cluster.yaml with these arguments of its application; None takes one out."""
    content = yaml.safe_load(cluster_file.shipped().read_text())
    application = content["metadata"]["serve"]["applications"][0]
    merged = application["args"] | args
    application["args"] = {name: value for name, value in merged.items() if value is not None}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return cluster_file.read(path)


def test_here_it_is_on_loopback_without_keys_and_says_so() -> None:
    config, notes = configuration(cluster_file.read(), DeployRecipe(), here=True)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert config["proxy_location"] == "HeadOnly"
    [application] = config["applications"]
    assert application["args"] == {"model": "demo"}
    assert notes == [
        "AXICON_API_KEYS holds no key here: generate answers this machine only, and without keys"
    ]


def test_keys_travel_as_digests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_API_KEYS", "sk-secret")
    for here in (True, False):
        config, notes = configuration(cluster_file.read(), DeployRecipe(), here=here)
        args = config["applications"][0]["args"]
        assert args["api_key_hashes"] == [hashlib.sha256(b"sk-secret").hexdigest()]
        assert "api_keys_env" not in args
        assert "sk-secret" not in repr(config)
        assert notes == []


def test_admin_keys_travel_as_digests_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = file_with(tmp_path, admin_keys_env="AXICON_TEST_ADMIN", api_keys_env=None)
    with pytest.raises(AxiconError, match="admin_keys_env=AXICON_TEST_ADMIN"):
        configuration(file, DeployRecipe(), here=True)
    monkeypatch.setenv("AXICON_TEST_ADMIN", "sk-secret")
    config, _ = configuration(file, DeployRecipe(), here=True)
    args = config["applications"][0]["args"]
    assert args["admin_key_hashes"] == [hashlib.sha256(b"sk-secret").hexdigest()]
    assert "admin_keys_env" not in args


def test_elsewhere_the_file_decides_and_the_cluster_has_the_keys() -> None:
    config, notes = configuration(cluster_file.read(), DeployRecipe(port=9000), here=False)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 9000}
    assert config["proxy_location"] == "EveryNode"
    assert config["applications"][0]["args"]["api_keys_env"] == "AXICON_API_KEYS"
    assert notes == []


def test_beyond_loopback_it_needs_keys(tmp_path: Path) -> None:
    for file, here in ((cluster_file.read(), True), (file_with(tmp_path, api_keys_env=None), True)):
        with pytest.raises(AxiconError, match=r"holds no key|has no API keys"):
            configuration(file, DeployRecipe(host="0.0.0.0"), here=here)
    with pytest.raises(AxiconError, match="generate has no API keys"):
        configuration(file_with(tmp_path, api_keys_env=None), DeployRecipe(), here=False)
    named = file_with(tmp_path, api_keys_env=None, allowed_hosts=["models.example"])
    assert configuration(named, DeployRecipe(), here=False)[0]["http_options"]["host"] == "0.0.0.0"


def test_a_model_beside_the_file_is_found_by_replicas(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config, _ = configuration(file_with(tmp_path, model="mine"), DeployRecipe(), here=True)
    assert config["applications"][0]["args"]["model"] == str(tmp_path / "mine")
    config, _ = configuration(file_with(tmp_path, model="other"), DeployRecipe(), here=True)
    assert config["applications"][0]["args"]["model"] == "other"


def test_serve_that_listens_elsewhere_is_one_line(free_port: int) -> None:
    config = {"http_options": {"host": "127.0.0.1", "port": free_port}}
    deploy._check_place({}, config, here=True)
    running = {"http_options": {"host": "127.0.0.1", "port": 8000}}
    with pytest.raises(
        AxiconError, match=r"listens on 127.0.0.1:8000 .* deploy with host=127.0.0.1 port=8000"
    ):
        deploy._check_place(running, config, here=True)
    deploy._check_place({"http_options": {"host": "127.0.0.1", "port": free_port}}, config, here=True)


def test_a_port_that_is_taken_is_one_line() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = {"http_options": {"host": "127.0.0.1", "port": taken.getsockname()[1]}}
        with pytest.raises(AxiconError, match=r"is in use by .*; stop that, or take another port"):
            deploy._check_place({}, config, here=True)
        deploy._check_place({}, config, here=False)


def application(status: str, *states: str, message: str = "", wanted: int = 1) -> dict[str, Any]:
    """What Serve's interface says of one application, as far as it is read."""
    replicas = [{"state": state} for state in states]
    generator = {"name": "Generator", "replicas": replicas, "target_num_replicas": wanted, "message": message}
    return {"status": status, "message": "", "deployments": {"Generator": generator}}


def test_progress_counts_replicas_and_passes_on_what_they_wait_for() -> None:
    line = deploy.progress(
        "generate", application("DEPLOYING", "STARTING", message="needs CPU\nmore", wanted=2)
    )
    assert line == "generate: deploying, Generator 0 of 2 replicas run, needs CPU"
    done = deploy.progress("generate", application("RUNNING", "RUNNING"))
    assert done == "generate: running, Generator 1 of 1 replicas run"


def test_the_reason_is_our_own_line_if_there_is_one() -> None:
    trace = "Traceback:\n  File x\naxicon.errors.AxiconError: model=x: no such model; give another\n"
    assert (
        deploy.reason(application("DEPLOY_FAILED", message=trace)) == "model=x: no such model; give another"
    )
    assert deploy.reason(application("DEPLOY_FAILED", message="a\nlast line")) == "last line"
    assert "no reason" in deploy.reason(application("DEPLOY_FAILED"))


def test_the_upload_is_the_four_packages_and_small() -> None:
    with upload.packages() as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted(upload.PACKAGES)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 5 * 2**20
        assert (folder / "jobs" / "cluster.yaml").read_bytes() == cluster_file.shipped().read_bytes()
        assert not [path for path in files if "__pycache__" in path.parts or path.suffix == ".so"]
    assert not folder.exists()


def test_the_application_is_told_with_a_command_to_try() -> None:
    from jobs.dashboard import Dashboard

    config, _ = configuration(cluster_file.read(), DeployRecipe(), here=False)
    target = Dashboard("http://10.0.0.1:8265", "t", "here")
    [line] = deploy.addresses(config, target)
    assert line.startswith("generate answers at http://10.0.0.1:8000   try: curl http://10.0.0.1:8000/v1/")
    assert "Bearer $KEY" in line
