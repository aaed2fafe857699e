"""`axicon render`: the same cluster.yaml for where its node table cannot go.

`kuberay` writes resources for Kubernetes' KubeRay operator (1.5.1 or newer): a RayService with the node table
and the Serve configuration, and a RayJob for each job. `onprem` writes a cluster.yaml for machines that are
there already: Ray's provider `local` takes addresses and no node table, so what the table says of a node goes
to the command line of its `ray start`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from axicon import __version__
from axicon.errors import AxiconError
from axicon.settings import Recipe, Words
from jobs.cluster_file import ClusterFile, NodeType

API = "ray.io/v1"
GIB_PER_CPU = 4
"""Memory asked for a node whose type does not name its `memory`, as ordinary machines have it."""
HEAD_CPUS = 2
"""What the head's own processes and its proxy get when its type says CPU 0, for replicas and jobs."""
RETRIES = 2
"""Of a job. Every verb takes up what lies in its folder, so another try goes on."""
LONGEST_NAME = 47
"""Characters: of the 53 that KubeRay takes for a cluster it needs 6 for the ones it makes."""
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""A value of a label, and what follows the `/` of its key."""
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}


class KuberayRecipe(Recipe):
    """What to write for Kubernetes."""

    cluster: Path | None = Field(None, description="the cluster.yaml; none: the one that comes with axicon")
    image: str = Field(f"axicon:{__version__}", min_length=1, description="container image with axicon in it")
    out: Path | None = Field(None, description="file to write; none: standard output")


class OnpremRecipe(Recipe):
    """What to write for machines with addresses."""

    cluster: Path | None = Field(None, description="the cluster.yaml; none: the one that comes with axicon")
    head: str | None = Field(None, min_length=1, description="address of the head; always needed")
    workers: Words = Field((), description="addresses, comma between; gpu@ADDRESS is one of the type gpu")
    out: Path | None = Field(None, description="file to write; none: standard output")


def kuberay(file: ClusterFile, recipe: KuberayRecipe) -> str:
    """A RayService, and a RayJob for every job, as one file of several documents.

    Raises AxiconError for names that Kubernetes does not take, which its operator would say after the fact.
    """
    documents = [_service(file, recipe.image), *(_job(file, recipe.image, name) for name in file.jobs)]
    keys = key_variables(file)
    lines = [f"# From {file.path.name} by `axicon render kuberay`. Needs KubeRay 1.5.1 or newer."]
    if keys:
        literals = " ".join(f'--from-literal={key}="$(openssl rand -hex 24)"' for key in keys)
        secret = secret_name(file)
        lines.append(f"# Once before: kubectl create secret generic {secret} {literals}")
    return "\n".join(lines) + "\n" + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, and nothing by reference: people read these files."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _service(file: ClusterFile, image: str) -> dict[str, Any]:
    serve = yaml.dump(file.metadata.serve, Dumper=_Dumper, sort_keys=False)
    return {
        "apiVersion": API,
        "kind": "RayService",
        "metadata": {"name": _named(file.name, "cluster_name")},
        "spec": {"serveConfigV2": serve, "rayClusterConfig": _cluster(file, image)},
    }


def _job(file: ClusterFile, image: str, name: str) -> dict[str, Any]:
    job = file.jobs[name]
    spec: dict[str, Any] = {
        "entrypoint": job.entrypoint,
        "backoffLimit": RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
    }
    given = {
        "entrypointNumCpus": job.entrypoint_num_cpus,
        "entrypointNumGpus": job.entrypoint_num_gpus,
        "entrypointResources": json.dumps(job.entrypoint_resources) if job.entrypoint_resources else None,
        "runtimeEnvYAML": yaml.safe_dump(job.runtime_env, sort_keys=False) if job.runtime_env else None,
        "metadata": job.metadata,
        "jobId": job.submission_id,
    }
    spec |= {key: value for key, value in given.items() if value is not None}
    unknown = [key for key in ("entrypoint_memory", "entrypoint_label_selector") if getattr(job, key)]
    if unknown:
        raise AxiconError(f"metadata.jobs.{name}: a RayJob has no {unknown[0]}; use entrypoint_resources")
    return {
        "apiVersion": API,
        "kind": "RayJob",
        "metadata": {
            "name": _named(f"{file.name}-{name}".replace("_", "-").lower(), f"metadata.jobs.{name}")
        },
        "spec": spec | {"rayClusterSpec": _cluster(file, image)},
    }


def _named(name: str, where: str) -> str:
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise AxiconError(
            f"{where}: {name!r} is no name for KubeRay, which takes a small letter and then small letters, "
            f"digits and dashes, {LONGEST_NAME} at most"
        )
    return name


def _cluster(file: ClusterFile, image: str) -> dict[str, Any]:
    head = {"rayStartParams": {"dashboard-host": "0.0.0.0"} | _start_params(file.head)}
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": any(node.max_workers > node.min_workers for node in file.workers),
        "headGroupSpec": head | _labels(file.head) | {"template": _pod(file, file.head, image, head=True)},
        "workerGroupSpecs": [_group(file, node, image) for node in file.workers],
    }


def _group(file: ClusterFile, node: NodeType, image: str) -> dict[str, Any]:
    return {
        "groupName": node.name,
        "replicas": node.min_workers,
        "minReplicas": node.min_workers,
        "maxReplicas": node.max_workers,
        "rayStartParams": _start_params(node),
        **_labels(node),
        "template": _pod(file, node, image, head=False),
    }


def _labels(node: NodeType) -> dict[str, Any]:
    """KubeRay refuses labels among `rayStartParams`; the group's own are also those of its pods."""
    for key, value in node.labels.items():
        if not LABEL.fullmatch(key.rpartition("/")[2]) or (value and not LABEL.fullmatch(value)):
            raise AxiconError(
                f"available_node_types.{node.name}.labels: {key}: {value!r} is no label for Kubernetes, "
                "which takes 63 letters, digits, dashes, dots and underscores, a letter or digit at both ends"
            )
    return {"labels": dict(node.labels)} if node.labels else {}


def _start_params(node: NodeType) -> dict[str, str]:
    counts = dict(node.resources)
    params = {"num-cpus": str(counts.pop("CPU", 0))}
    if gpus := counts.pop("GPU", 0):
        params["num-gpus"] = str(gpus)
    if memory := counts.pop("memory", 0):
        params["memory"] = str(memory)
    if counts:
        params["resources"] = json.dumps(json.dumps(counts))  # KubeRay puts it on a shell's command line
    return params


def _pod(file: ClusterFile, node: NodeType, image: str, *, head: bool) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": image,
        "env": _env(file),
        "resources": _requests(node),
    }
    if head:
        serve = {"serve": file.serve.http_options.port}
        container["ports"] = [{"containerPort": port, "name": name} for name, port in (PORTS | serve).items()]
    return {"spec": {"containers": [container]}}


def _requests(node: NodeType) -> dict[str, Any]:
    """What the pod asks of Kubernetes, and is held to."""
    cpus = node.resources.get("CPU", 0) or HEAD_CPUS
    memory = node.resources.get("memory")
    wanted = {"cpu": str(cpus), "memory": str(memory) if memory else f"{cpus * GIB_PER_CPU}Gi"}
    if gpus := node.resources.get("GPU", 0):
        wanted["nvidia.com/gpu"] = str(gpus)
    return {"requests": dict(wanted), "limits": dict(wanted)}


def _env(file: ClusterFile) -> list[dict[str, Any]]:
    plain = [{"name": name, "value": value} for name, value in file.metadata.env.items()]
    storage = [{"name": "AXICON_STORAGE", "value": file.metadata.storage_path}]
    secret = secret_name(file)
    keys = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for key in key_variables(file)
    ]
    return [*plain, *storage, *keys]


def key_variables(file: ClusterFile) -> list[str]:
    """The environment variables that applications take API keys from."""
    found = [application.args.get("api_keys_env") for application in file.serve.applications]
    return sorted({key for key in found if key})


def secret_name(file: ClusterFile) -> str:
    return f"{file.name}-api-keys"


def onprem(file: ClusterFile, recipe: OnpremRecipe) -> str:
    """A cluster.yaml with the provider `local`. Raises AxiconError for addresses it cannot place."""
    if recipe.head is None:
        raise AxiconError("head= is missing: give the address of the head, for example head=10.0.0.1")
    placed = _placed(file, recipe.workers)
    if recipe.head in placed:
        raise AxiconError(f"{recipe.head} is given as head and as worker; a machine is one of them")
    content = dict(file.content)
    for key in ("available_node_types", "head_node_type", "max_workers"):
        content.pop(key, None)
    content["provider"] = {"type": "local", "head_ip": recipe.head, "worker_ips": list(placed)}
    content["max_workers"] = len(placed)
    for key, flags in (
        ("head_start_ray_commands", [("", _flags(file.head))]),
        ("worker_start_ray_commands", [(address, _flags(node)) for address, node in placed.items()]),
    ):
        content[key] = _with_flags(content.get(key), key, flags)
    head = f"# From {file.path.name} by `axicon render onprem`: for `ray up`, on machines that are there.\n"
    return head + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110)


def _placed(file: ClusterFile, words: tuple[str, ...]) -> dict[str, NodeType]:
    """Address to type; an address without a type is one of the table's first."""
    if not file.workers and words:
        raise AxiconError(f"{file.path}: has no worker in available_node_types for {', '.join(words)}")
    types = {node.name: node for node in file.workers}
    placed: dict[str, NodeType] = {}
    for word in words:
        name, sign, address = word.rpartition("@")
        if sign and name not in types:
            raise AxiconError(f"workers={word}: no worker type {name!r}; known are {', '.join(types)}")
        if not re.fullmatch(r"[A-Za-z0-9.:-]+", address):
            raise AxiconError(f"workers={word}: {address!r} is no address")
        if address in placed:
            raise AxiconError(f"workers={word}: {address} is given twice; keep one")
        placed[address] = types[name] if sign else file.workers[0]
    return placed


def _flags(node: NodeType) -> str:
    """Options of `ray start` that say what the node table says."""
    counts = dict(node.resources)
    flags = [f"--num-cpus={counts.pop('CPU', 0)}", f"--num-gpus={counts.pop('GPU', 0)}"]
    if memory := counts.pop("memory", 0):
        flags.append(f"--memory={memory}")
    if counts:
        flags.append(f"--resources={json.dumps(counts)}")
    if node.labels:
        flags.append("--labels=" + ",".join(f"{name}={value}" for name, value in node.labels.items()))
    return shlex.join(flags)


def _with_flags(commands: Any, key: str, flags: list[tuple[str, str]]) -> list[str]:
    """The start commands with these options after `ray start`; by the node's own address if they differ."""
    found = list(commands or [])
    if not any(re.search(START, command) for command in found):
        raise AxiconError(f"{key}: has no `ray start` to put a node's resources and labels on")
    different = {text for _, text in flags}
    if len(different) <= 1:
        chosen, choose = "".join(different), ""
    else:
        # Every worker runs the same commands, so each finds itself among the addresses.
        cases = " ".join(f'*" {address} "*) set -- {text};;' for address, text in flags)
        names = "$(hostname -I) $(hostname) $(hostname -f)"
        choose = f'case " {names} " in {cases} *) echo "not in worker_ips" >&2; exit 1;; esac; '
        chosen = '"$@"'
    return [re.sub(START, lambda match: f"{choose}{match[0]} {chosen}".rstrip(), one) for one in found]


START = r"(?:\S*/)?\bray start\b"


def run(text: str, out: Path | None) -> str:
    """Write a rendered file, or return it to be printed. Returns what to say."""
    if out is None:
        return text.rstrip("\n")
    try:
        out.write_text(text)
    except OSError as error:
        raise AxiconError(f"out={out}: cannot be written ({error.strerror}); give another file") from None
    return f"written to {out}"
