"""The loader of cluster.yaml: what it takes from a file, and what it refuses by name."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from axicon.errors import AxiconError
from jobs import cluster_file


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load(cluster_file.shipped().read_text())


def written(content: Any, folder: Path) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def put(content: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """A copy of the content with `value` at a dotted place."""
    content = copy.deepcopy(content)
    *parents, last = where.split("/")
    place: Any = content
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return content


def test_the_node_table_is_read_whole() -> None:
    file = cluster_file.read()
    assert (file.name, file.provider) == ("axicon", "aws")
    assert file.head.name == "head"
    assert file.head.resources == {"CPU": 0}
    cpu, gpu = file.workers
    assert (cpu.name, cpu.min_workers, cpu.max_workers, cpu.resources) == ("cpu", 1, 3, {"CPU": 8})
    assert gpu.labels == {"role": "worker", "nic": "efa", "gpu": "h100"}
    assert file.jobs["evaluate"].entrypoint.startswith("python -m jobs evaluate")
    assert file.serve.http_options.port == 8000
    assert file.warnings() == []


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("max_wokers", 3, "unknown key 'max_wokers': did you mean 'max_workers'?"),
        ("auth/ssh_usr", "x", "in auth, unknown key 'ssh_usr': did you mean 'ssh_user'?"),
        (
            "available_node_types/cpu/lables",
            {},
            "in available_node_types.cpu, unknown key 'lables': did you mean 'labels'?",
        ),
        ("metadata/storage", "x", "in metadata, unknown key 'storage': did you mean 'storage_path'?"),
        ("metadata/local/resource", {}, "did you mean 'local.resources'?"),
        ("metadata/serve/aplications", [], "in metadata.serve, unknown key 'aplications'"),
        ("metadata/serve/http_options/prot", 1, "did you mean 'http_options.port'?"),
        (
            "metadata/serve/applications/0/args/modle",
            "x",
            "in metadata.serve.applications.0.args, unknown key 'modle': did you mean 'model'?",
        ),
        (
            "metadata/serve/applications/0/rout_prefix",
            "/",
            "unknown key 'applications.0.rout_prefix': did you mean 'applications.0.route_prefix'?",
        ),
        ("metadata/jobs/evaluate/entry_point", "x", "in metadata.jobs.evaluate, unknown key 'entry_point'"),
        ("metadata/jobs/evaluate/entrypoint_num_cpus", -1, "must be greater than or equal to 0"),
        ("metadata/version", 9, "in metadata, version=9: must be less than or equal to 1"),
        ("available_node_types/cpu/resources", {"CPU": 0.5}, "0.5 is not of type 'integer'"),
        ("available_node_types/cpu/labels", {"port": 80}, "80 is not of type 'string'"),
        ("head_node_type", "haed", "'haed' is not in available_node_types, which has head, cpu, gpu"),
        ("available_node_types/cpu", None, "available_node_types.cpu: has no settings"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_nearest_key(
    content: dict[str, Any], tmp_path: Path, where: str, value: Any, says: str
) -> None:
    path = written(put(content, where, value), tmp_path)
    with pytest.raises(AxiconError) as caught:
        cluster_file.read(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_only_spelt_otherwise_is_not_called_missing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["metadata"]["serv"] = content["metadata"].pop("serve")
    with pytest.raises(AxiconError, match="unknown key 'serv': did you mean 'serve'"):
        cluster_file.read(written(content, tmp_path))
    content["metdata"] = content.pop("metadata")
    with pytest.raises(AxiconError, match="unknown key 'metdata': did you mean 'metadata'"):
        cluster_file.read(written(content, tmp_path))


def test_a_file_without_a_name_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    del content["cluster_name"]
    with pytest.raises(AxiconError, match="'cluster_name' is a required property"):
        cluster_file.read(written(content, tmp_path))


@pytest.mark.parametrize("storage", ["/mnt/models", "file:///mnt/models"])
def test_storage_of_one_machine_is_a_warning_where_there_are_several(
    content: dict[str, Any], tmp_path: Path, storage: str
) -> None:
    path = written(put(content, "metadata/storage_path", storage), tmp_path)
    [warning] = cluster_file.read(path).warnings()
    assert storage in warning
    for name in ("cpu", "gpu"):
        content["available_node_types"].pop(name)
    alone = put(content, "metadata/storage_path", storage)
    assert cluster_file.read(written(alone, tmp_path)).warnings() == []


def test_a_file_with_addresses_has_a_head_and_workers(content: dict[str, Any], tmp_path: Path) -> None:
    del content["available_node_types"], content["head_node_type"]
    content["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    file = cluster_file.read(written(content, tmp_path))
    assert file.provider == "local"
    assert [(node.min_workers, node.max_workers) for node in file.workers] == [(2, 2)]


def test_the_typed_parts_know_every_key_that_ray_knows() -> None:
    from ray.job_submission import JobSubmissionClient
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    for ours, rays in (
        (cluster_file.ServeConfig, ServeDeploySchema),
        (cluster_file.HttpOptions, HTTPOptionsSchema),
    ):
        assert ours.model_fields.keys() == rays.model_fields.keys()
    # `host` and `port` of an application are refused by Serve in a configuration of several.
    application = ServeApplicationSchema.model_fields.keys() - {"host", "port"}
    assert cluster_file.Application.model_fields.keys() == application
    submit = inspect.signature(JobSubmissionClient.submit_job).parameters.keys() - {"self", "job_id"}
    assert cluster_file.Job.model_fields.keys() == submit
    assert HTTPOptionsSchema().host == cluster_file.HttpOptions().host


def test_only_what_was_said_reaches_serve() -> None:
    file = cluster_file.read()
    assert file.serve.as_config() == file.metadata.serve
