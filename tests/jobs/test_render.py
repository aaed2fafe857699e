"""`axicon render`: what the documents say is what the node table says."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from axicon import __version__
from axicon.errors import AxiconError
from jobs import cluster_file
from jobs.render import KuberayRecipe, OnpremRecipe, kuberay, onprem, run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> cluster_file.ClusterFile:
    """The shipped file, with a custom resource and memory on one type, and a job with all a RayJob has."""
    content = yaml.safe_load(cluster_file.shipped().read_text())
    content["available_node_types"]["gpu"]["resources"] |= {"tpu": 2, "memory": 2**34}
    content["metadata"]["jobs"]["long_one"] = {
        "entrypoint": "python -m jobs evaluate demo text=x",
        "entrypoint_num_cpus": 2,
        "entrypoint_num_gpus": 1,
        "entrypoint_resources": {"tpu": 1},
        "runtime_env": {"env_vars": {"A": "1"}},
        "submission_id": "once",
    }
    path = tmp_path_factory.mktemp("render") / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return cluster_file.read(path)


def documents(file: cluster_file.ClusterFile, **settings: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kuberay(file, KuberayRecipe(**settings))))


def test_one_service_and_a_job_for_each(file: cluster_file.ClusterFile) -> None:
    service, *jobs = documents(file)
    assert {document["apiVersion"] for document in (service, *jobs)} == {"ray.io/v1"}
    assert (service["kind"], service["metadata"]["name"]) == ("RayService", "axicon")
    assert [(job["kind"], job["metadata"]["name"]) for job in jobs] == [
        ("RayJob", "axicon-evaluate"),
        ("RayJob", "axicon-long-one"),
    ]


def test_the_serve_configuration_is_a_string_that_says_the_same(file: cluster_file.ClusterFile) -> None:
    from ray.serve.schema import ServeDeploySchema

    service, *_ = documents(file)
    text = service["spec"]["serveConfigV2"]
    assert isinstance(text, str)
    assert yaml.safe_load(text) == file.metadata.serve
    ServeDeploySchema.model_validate(yaml.safe_load(text))


def test_groups_are_the_rows_of_the_node_table(file: cluster_file.ClusterFile) -> None:
    service, *jobs = documents(file)
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0"}
    assert head["labels"] == file.head.labels
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == [n.name for n in file.workers]
    for group, node in zip(cluster["workerGroupSpecs"], file.workers, strict=True):
        assert (group["replicas"], group["minReplicas"]) == (node.min_workers, node.min_workers)
        assert group["maxReplicas"] == node.max_workers
        assert group["labels"] == node.labels
        assert group["rayStartParams"]["num-cpus"] == str(node.resources["CPU"])
    assert all(job["spec"]["rayClusterSpec"] == cluster for job in jobs)


def test_pods_ask_for_what_their_node_has(file: cluster_file.ClusterFile) -> None:
    service, *_ = documents(file)
    cpu, gpu = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = cpu["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "32Gi"}
    [container] = gpu["template"]["spec"]["containers"]
    wanted = {"cpu": "8", "memory": str(2**34), "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    assert gpu["rayStartParams"]["num-gpus"] == "1"
    assert gpu["rayStartParams"]["memory"] == str(2**34)
    # The operator puts the value on a shell's command line.
    assert json.loads(shlex.split(gpu["rayStartParams"]["resources"])[0]) == {"tpu": 2}


def test_every_container_has_the_image_the_environment_and_the_keys(file: cluster_file.ClusterFile) -> None:
    service, *_ = documents(file, image="registry.example/axicon:9")
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for container in (one for group in groups for one in group["template"]["spec"]["containers"]):
        assert container["image"] == "registry.example/axicon:9"
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert env.items() >= file.metadata.env.items()
        assert env["AXICON_STORAGE"] == file.metadata.storage_path
        [keys] = [entry for entry in container["env"] if entry["name"] == "AXICON_API_KEYS"]
        assert keys["valueFrom"]["secretKeyRef"] == {"name": "axicon-api-keys", "key": "AXICON_API_KEYS"}
    assert KuberayRecipe().image == f"axicon:{__version__}"


FIELDS = {
    "RayService": {"serveConfigV2", "rayClusterConfig"},
    "RayJob": {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "jobId",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "runtimeEnvYAML", "metadata",
        "rayClusterSpec",
    },
    "cluster": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs",
    },
    "head": {"rayStartParams", "labels", "template"},
    "group": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "labels", "template",
    },
}  # fmt: skip
"""Of KubeRay's definitions (raycluster_types.go and its neighbours), those that are used here."""


def test_there_is_no_field_that_kuberay_does_not_know(file: cluster_file.ClusterFile) -> None:
    """Kubernetes drops a field it does not know without a word."""
    for document in documents(file):
        spec = document["spec"]
        assert spec.keys() <= FIELDS[document["kind"]]
        cluster = spec["rayClusterConfig"] if document["kind"] == "RayService" else spec["rayClusterSpec"]
        assert cluster.keys() <= FIELDS["cluster"]
        assert cluster["headGroupSpec"].keys() <= FIELDS["head"]
        for group in cluster["workerGroupSpecs"]:
            assert group.keys() <= FIELDS["group"]
            params = [*group["rayStartParams"].values(), *cluster["headGroupSpec"]["rayStartParams"].values()]
            assert all(isinstance(value, str) for value in params)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cluster_name": "My_Cluster"}, "cluster_name: 'My_Cluster' is no name for KubeRay"),
        ({"cluster_name": "a" * 48}, "is no name for KubeRay"),
        ({"cluster_name": "a" * 40}, "metadata.jobs.evaluate: "),
        ({"role": "a worker"}, r"available_node_types.cpu.labels: role: 'a worker' is no label"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    content = yaml.safe_load(cluster_file.shipped().read_text())
    content["available_node_types"]["cpu"]["labels"]["role"] = change.get("role", "worker")
    content["cluster_name"] = change.get("cluster_name", "axicon")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(AxiconError, match=says):
        kuberay(cluster_file.read(path), KuberayRecipe())


def test_a_job_keeps_its_settings(file: cluster_file.ClusterFile) -> None:
    _, short, long = documents(file)
    assert short["spec"]["entrypoint"] == file.jobs["evaluate"].entrypoint
    assert short["spec"]["backoffLimit"] >= 1
    spec = long["spec"]
    assert (spec["entrypointNumCpus"], spec["entrypointNumGpus"], spec["jobId"]) == (2.0, 1.0, "once")
    assert json.loads(spec["entrypointResources"]) == {"tpu": 1.0}
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"A": "1"}}


def rendered(file: cluster_file.ClusterFile, *workers: str) -> dict[str, Any]:
    return yaml.safe_load(onprem(file, OnpremRecipe(head="10.0.0.1", workers=workers)))


def test_ray_takes_the_onprem_file(file: cluster_file.ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import util

    content = rendered(file, "10.0.0.2", "gpu@10.0.0.3")
    jsonschema.validate(content, cluster_file.rays_schema())
    prepared = util.prepare_config(content)
    util.validate_config(prepared)
    assert prepared["provider"] == {
        "type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]
    }  # fmt: skip


def test_metadata_comes_through_unchanged_and_our_loader_reads_it(
    file: cluster_file.ClusterFile, tmp_path: Path
) -> None:
    path = tmp_path / "onprem.yaml"
    assert (
        run(onprem(file, OnpremRecipe(head="10.0.0.1", workers=("10.0.0.2",))), path) == f"written to {path}"
    )
    again = cluster_file.read(path)
    assert again.content["metadata"] == file.content["metadata"]
    assert (again.name, again.provider, again.metadata) == (file.name, "local", file.metadata)


def started(commands: list[str], folder: Path, address: str) -> list[str]:
    """The words `ray` would be started with on the machine with this address."""
    for name, text in (("ray", 'printf "%s\\n" "$@"'), ("hostname", f"echo {address}")):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    command = commands[-1].replace('export PATH="$HOME/axicon/.venv/bin:$PATH";', "")
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "RAY_HEAD_IP": "10.0.0.1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_each_machine_starts_ray_with_what_its_row_says(
    file: cluster_file.ClusterFile, tmp_path: Path
) -> None:
    content = rendered(file, "10.0.0.2", "gpu@10.0.0.3")
    head = started(content["head_start_ray_commands"], tmp_path, "10.0.0.1")
    assert head[:2] == ["start", "--num-cpus=0"]
    assert {"--head", "--labels=role=head,nic=ethernet"} <= set(head)
    commands = content["worker_start_ray_commands"]
    cpu = started(commands, tmp_path, "10.0.0.2")
    assert {"--num-cpus=8", "--num-gpus=0", "--labels=role=worker,nic=ethernet"} <= set(cpu)
    gpu = started(commands, tmp_path, "10.0.0.3")
    assert {"--num-gpus=1", '--resources={"tpu": 2}', f"--memory={2**34}"} <= set(gpu)
    assert "--address=10.0.0.1:6379" in gpu
    assert started(commands, tmp_path, "10.0.0.9") == []


def test_start_commands_are_kept(file: cluster_file.ClusterFile) -> None:
    content = rendered(file, "10.0.0.2")
    flags = "--num-cpus=8 --num-gpus=0 --labels=role=worker,nic=ethernet "
    kept = [command.replace(flags, "") for command in content["worker_start_ray_commands"]]
    assert kept == file.content["worker_start_ray_commands"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": ["10.0.0.2"]}, "head= is missing"),
        ({"head": "a", "workers": ["tpu@b"]}, "no worker type 'tpu'; known are cpu, gpu"),
        ({"head": "a", "workers": ["b", "gpu@b"]}, "b is given twice"),
        ({"head": "a", "workers": ["a"]}, "a is given as head and as worker"),
        ({"head": "a", "workers": ["b;reboot"]}, "is no address"),
    ],
)
def test_wrong_addresses_are_one_line(
    file: cluster_file.ClusterFile, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(AxiconError, match=says):
        onprem(file, OnpremRecipe(**settings))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="cannot be written"):
        run("text", tmp_path / "none" / "x.yaml")
