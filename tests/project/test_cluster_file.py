"""cluster.yaml: Ray accepts it, and the local cluster, the start commands and the server agree with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from jobs import cluster, cluster_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def exports(commands: list[str]) -> dict[str, str]:
    """What a list of start commands exports, quotes removed."""
    found = {}
    for command in commands:
        for line in re.findall(r"export ([^;]+);", command):
            for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', line):
                found[name] = value.strip('"')
    return found


def test_rays_own_schema_accepts_it(config: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"surprise": 1}, schema)


def test_ray_up_accepts_it(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import util

    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    assert prepared["available_node_types"]["cpu"]["resources"] == {"CPU": 8}


def test_serve_accepts_its_serve_part(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    serve = ServeDeploySchema.model_validate(config["metadata"]["serve"])
    [application] = serve.applications
    assert application.import_path == "services.app:build"
    args = ServeRecipe.model_validate(application.args)
    # Beyond loopback, keys are demanded, or the application refuses to be built.
    assert serve.http_options.host == "0.0.0.0"
    assert args.api_keys_env == "AXICON_API_KEYS"


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_start_commands_export_exactly_the_environment_of_metadata(
    config: dict[str, Any], commands: str
) -> None:
    found = exports(config[commands])
    own = {"PATH", "RAY_SERVE_HAPROXY_BINARY_PATH", "AXICON_API_KEYS", "AXICON_STORAGE"}
    assert found["AXICON_STORAGE"] == config["metadata"]["storage_path"]
    assert {name: value for name, value in found.items() if name not in own} == config["metadata"]["env"]
    assert found.keys() >= own


def test_jobs_are_what_ray_submits_and_what_axicon_has(config: dict[str, Any]) -> None:
    import inspect

    from ray.job_submission import JobSubmissionClient

    from jobs.__main__ import axicon

    known = inspect.signature(JobSubmissionClient.submit_job).parameters
    for name, job in config["metadata"]["jobs"].items():
        assert job.keys() <= known.keys()
        program, module, package, verb, *_ = job["entrypoint"].split()
        assert (program, module, package) == ("python", "-m", "jobs")
        assert verb in axicon.commands, name


def test_the_local_cluster_is_read_from_it(config: dict[str, Any], tmp_path: Path) -> None:
    metadata = cluster_file.read().metadata
    assert metadata.local.resources == config["metadata"]["local"]["resources"]
    env = cluster.environment(metadata, tmp_path)
    for name, value in (config["metadata"]["env"] | config["metadata"]["local"]["env"]).items():
        assert env[name] == value
    # Whatever two servers of one machine could fight over is in the private folder or a port of its own.
    others = cluster.environment(metadata, tmp_path / "other")
    apart = {name for name in env if env[name] != others[name]}
    assert apart >= {name for name in env if name.endswith(("_PORT", "_LOC", "_BASE", "_FILE", "_TMPDIR"))}


def test_the_packaged_copy_is_the_file_itself() -> None:
    assert cluster_file.shipped().read_bytes() == (ROOT / "cluster.yaml").read_bytes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "no valid YAML"),
        ("a: 1", "has no `metadata`"),
        ("metadata: {version: 2}", "in metadata, "),
        (
            "metadata: {version: 1, storage_path: x, env: {}, serve: {}, jobs: {}, lcoal: {}}",
            "did you mean 'local'",
        ),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(AxiconError) as caught:
        cluster_file.read(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"cannot be read \(No such file or directory\)"):
        cluster_file.read(tmp_path / "none.yaml")
