"""cluster.yaml: the one definition of a cluster, read and checked as a whole.

Everything outside `metadata` is Ray's and is checked with the schema that Ray ships; `metadata` is ours. What
is wrong is found before anything is started and said in one line, with the nearest key that exists.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from axicon.settings import Recipe, unknown_key

R = TypeVar("R", bound=Recipe)

FLOOR_MIB = 75
"""Ray refuses an object store smaller than this."""
OUR_APPLICATION = "services.app:build"


class LocalNode(Recipe):
    """`metadata.local`: what is different when the cluster is on one machine."""

    resources: dict[str, int] = Field({"CPU": 4})
    """Of the one node of `axicon serve`. Counts that Ray hands out; they need not be real."""
    object_store_mib: int = Field(96, ge=FLOOR_MIB)
    """Of every node."""
    storage_path: str | None = Field(None, min_length=1)
    """In place of `metadata.storage_path`; none: a folder of this user, by the cluster's name."""
    env: dict[str, str] = Field({})
    """What differs from `metadata.env`."""


class HttpOptions(Recipe):
    """Where Serve listens. The default of `host` is Serve's own for a configuration."""

    host: str = Field("0.0.0.0", min_length=1)
    port: int = Field(8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = None
    keep_alive_timeout_s: int | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class Application(Recipe):
    """One application of a Serve configuration."""

    name: str = Field("default", min_length=1)
    route_prefix: str | None = "/"
    import_path: str
    args: dict[str, Any] = Field({})
    runtime_env: dict[str, Any] = Field({})
    deployments: list[dict[str, Any]] = Field([])
    autoscaling_policy: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    external_scaler_enabled: bool | None = None


class ServeConfig(Recipe):
    """`metadata.serve`: a whole ServeDeploySchema."""

    proxy_location: str = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    grpc_options: dict[str, Any] | None = None
    controller_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    tracing_config: dict[str, Any] | None = None
    applications: list[Application] = Field(min_length=1)
    target_capacity: float | None = None

    def as_config(self) -> dict[str, Any]:
        """What Serve's own interface takes: only what was said, so that its defaults stay its own."""
        return self.model_dump(mode="json", exclude_unset=True)


class Job(Recipe):
    """One of `metadata.jobs`: arguments of `JobSubmissionClient.submit_job`."""

    entrypoint: str = Field(min_length=1)
    runtime_env: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    submission_id: str | None = None
    entrypoint_num_cpus: float | None = Field(None, ge=0)
    entrypoint_num_gpus: float | None = Field(None, ge=0)
    entrypoint_memory: int | None = Field(None, ge=0)
    entrypoint_resources: dict[str, float] | None = None
    entrypoint_label_selector: dict[str, str] | None = None


class Metadata(Recipe):
    """`metadata`: the part of cluster.yaml that is ours."""

    version: int = Field(ge=1, le=1)
    storage_path: str
    env: dict[str, str]
    """Variables Ray reads when its processes start."""
    local: LocalNode = LocalNode()
    serve: dict[str, Any]
    """A ServeDeploySchema, see ServeConfig."""
    jobs: dict[str, dict[str, Any]]
    """By job name, see Job."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """One row of the node table."""

    name: str
    resources: dict[str, int]
    labels: dict[str, str]
    min_workers: int
    max_workers: int


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """A checked cluster.yaml."""

    path: Path
    content: dict[str, Any]
    """The file as it is written."""
    name: str
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    metadata: Metadata
    serve: ServeConfig
    jobs: dict[str, Job]

    def warnings(self) -> list[str]:
        """What will not do on more than one machine, a line each."""
        storage = self.metadata.storage_path
        if "://" in storage.removeprefix("file://") or not any(node.max_workers for node in self.workers):
            return []
        return [
            f"{self.path}: storage_path {storage} is a path of one machine, and the cluster has several; "
            "name what every node reaches, such as s3://BUCKET/PATH or a shared file system"
        ]


def shipped() -> Path:
    """The cluster.yaml that comes with axicon. In a checkout it is a link to the one at the root."""
    return Path(__file__).with_name("cluster.yaml")


def read(path: Path | None = None) -> ClusterFile:
    """A cluster.yaml, the shipped one if none is given. Raises AxiconError."""
    path = path or shipped()
    content = _content(path)
    try:
        _check_keys(content)
        metadata = _part(Metadata, content["metadata"], "metadata")
        serve = _part(ServeConfig, metadata.serve, "metadata.serve")
        for index, application in enumerate(serve.applications):
            if application.import_path == OUR_APPLICATION:
                _part(ServeRecipe, application.args, f"metadata.serve.applications.{index}.args")
        jobs = {name: _part(Job, job, f"metadata.jobs.{name}") for name, job in metadata.jobs.items()}
        head, workers = _node_table(content)
        _check_schema(content)
    except AxiconError as error:
        raise AxiconError(f"{path}: {error}") from None
    name, provider = content["cluster_name"], content["provider"]["type"]
    return ClusterFile(path, content, name, provider, head, workers, metadata, serve, jobs)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise AxiconError(f"{path}: cannot be read ({error.strerror}); name another cluster.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise AxiconError(f"{path}: no valid YAML ({reason}); mend the file") from None
    if isinstance(content, dict) and "metadata" not in content:
        for near in difflib.get_close_matches("metadata", map(str, content), n=1):
            raise AxiconError(f"{path}: {unknown_key(near, ['metadata'])}")
    if not isinstance(content, dict) or not isinstance(content.get("metadata"), dict):
        raise AxiconError(f"{path}: has no `metadata`; start from the shipped {shipped()}")
    return content


def _part(kind: type[R], values: Mapping[str, Any], where: str) -> R:
    try:
        return kind.parse(**{str(key): value for key, value in values.items()})
    except AxiconError as error:
        raise AxiconError(f"in {where}, {error}") from None


@cache
def rays_schema() -> dict[str, Any]:
    """The schema of cluster.yaml that comes with Ray. Ray itself is not imported for it."""
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise AxiconError("Ray is not installed; run `make setup`")
    schema: dict[str, Any] = json.loads(
        (Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text()
    )
    return schema


def _check_keys(content: Mapping[str, Any]) -> None:
    """Unknown keys outside `metadata`, by the nearest known one."""
    schema = rays_schema()["properties"]
    _check_known(content, list(rays_schema()["properties"]), "")
    for part in ("auth", "docker"):
        _check_known(content.get(part), list(schema[part]["properties"]), part)
    types = content.get("available_node_types")
    [node_type] = schema["available_node_types"]["patternProperties"].values()
    for name, node in types.items() if isinstance(types, dict) else ():
        _check_known(node, list(node_type["properties"]), f"available_node_types.{name}")


def _check_known(part: Any, known: Sequence[str], where: str) -> None:
    for key in part if isinstance(part, dict) else ():
        if key not in known:
            raise AxiconError(f"in {where}, {unknown_key(key, known)}" if where else unknown_key(key, known))


def _check_schema(content: Mapping[str, Any]) -> None:
    """All else that Ray's schema says. Raises AxiconError."""
    import jsonschema

    for error in jsonschema.Draft7Validator(rays_schema()).iter_errors(content):
        where = ".".join(map(str, error.absolute_path))
        raise AxiconError(f"in {where}, {error.message}" if where else error.message)


def _node_table(content: Mapping[str, Any]) -> tuple[NodeType, tuple[NodeType, ...]]:
    """The head's type and the workers'. A file without a table has a head and its listed addresses."""
    types = content.get("available_node_types")
    if not isinstance(types, dict) or not types:
        provider = content.get("provider")
        count = len((isinstance(provider, dict) and provider.get("worker_ips")) or [])
        worker = NodeType("worker", {}, {}, count, count)
        return NodeType("head", {}, {}, 0, 0), (worker,) if count else ()
    head = content.get("head_node_type")
    if head not in types:
        raise AxiconError(
            f"head_node_type: {head!r} is not in available_node_types, which has {', '.join(map(str, types))}"
        )
    most = content.get("max_workers", 2)
    nodes = {name: _node_type(name, node, most) for name, node in types.items()}
    return nodes.pop(head), tuple(nodes.values())


def _node_type(name: str, node: Any, most: int) -> NodeType:
    if not isinstance(node, dict):
        raise AxiconError(f"available_node_types.{name}: has no settings; give resources and node_config")
    least = node.get("min_workers", 0)
    return NodeType(
        str(name),
        dict(node.get("resources") or {}),
        dict(node.get("labels") or {}),
        least,
        node.get("max_workers", most),
    )
