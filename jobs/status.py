"""`axicon status`: nodes, applications with their replicas, and jobs of a cluster, as text or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import Field
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from axicon.settings import Recipe
from jobs import dashboard
from jobs.dashboard import Dashboard
from jobs.deploy import APPLICATIONS, reason

RAYS_OWN = ("node:", "object_store_memory", "memory")
"""Resources Ray gives every node by itself."""
GROUP = "ray.io/node-group"
"""The label with a node's type."""
PLAIN = ("SUCCEEDED", "RUNNING")
"""States of a job to which Ray's message adds nothing."""


class StatusRecipe(Recipe):
    """Which cluster to look at."""

    name: str | None = Field(None, min_length=1, description="cluster of this machine; none: the only one")
    address: str | None = Field(None, description="URL of a dashboard; its token in RAY_AUTH_TOKEN_PATH")
    jobs: int = Field(10, ge=0, description="the newest so many jobs")


@dataclass(frozen=True, slots=True)
class Node:
    type: str
    head: bool
    alive: bool
    address: str
    resources: dict[str, float]
    labels: dict[str, str]
    message: str


@dataclass(frozen=True, slots=True)
class Application:
    name: str
    status: str
    replicas: list[str]
    """The state of each."""
    wanted: int
    message: str


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    status: str
    entrypoint: str
    started: str | None
    seconds: float | None
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    name: str | None
    dashboard: str
    storage: str | None
    serve: str | None
    """host:port where Serve listens; None when it does not run."""
    nodes: list[Node]
    applications: list[Application]
    jobs: list[Job]


def look(recipe: StatusRecipe) -> Status:
    """Ask the cluster. Raises AxiconError when nobody answers, or the token is wrong."""
    target = dashboard.find(recipe.name, recipe.address)
    nodes = target.get("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
    serve = target.get(APPLICATIONS)
    http = serve.get("http_options")
    found = [job(entry) for entry in _newest(target)[: recipe.jobs]]
    return Status(
        name=target.cluster.name if target.cluster else None,
        dashboard=target.url,
        storage=target.cluster.storage if target.cluster else None,
        serve=f"{http['host']}:{http['port']}" if http else None,
        nodes=sorted(map(node, nodes), key=lambda one: (not one.alive, not one.head, one.type, one.address)),
        applications=[application(name, entry) for name, entry in serve["applications"].items()],
        jobs=found,
    )


def _newest(target: Dashboard) -> list[dict[str, Any]]:
    """Submitted jobs, the newest first; those of drivers without a submission are not ours to tell of."""
    found = [entry for entry in target.get("/api/jobs/") if entry.get("submission_id")]
    return sorted(found, key=lambda entry: entry.get("start_time") or 0, reverse=True)


def node(entry: dict[str, Any]) -> Node:
    """A node from what Ray's state interface says of it."""
    labels = {name: value for name, value in entry["labels"].items() if not name.startswith("ray.io/")}
    total = entry["resources_total"]
    return Node(
        type=entry["labels"].get(GROUP, "-"),
        head=entry["is_head_node"],
        alive=entry["state"] == "ALIVE",
        address=entry["node_ip"],
        resources={name: count for name, count in sorted(total.items()) if not name.startswith(RAYS_OWN)},
        labels=labels,
        message=entry.get("state_message") or "",
    )


def application(name: str, entry: dict[str, Any]) -> Application:
    """An application from what Serve says of it."""
    deployments = entry["deployments"].values()
    well = entry["status"] == "RUNNING"
    return Application(
        name=name,
        status=entry["status"],
        replicas=[replica["state"] for one in deployments for replica in one["replicas"]],
        wanted=sum(one["target_num_replicas"] or 0 for one in deployments),
        message="" if well else reason(entry),
    )


def job(entry: dict[str, Any]) -> Job:
    """A job from what Ray says of it."""
    start, end = entry.get("start_time"), entry.get("end_time")
    started = datetime.fromtimestamp(start / 1000, UTC) if start else None
    return Job(
        id=entry["submission_id"],
        status=entry["status"],
        entrypoint=entry["entrypoint"],
        started=started.isoformat(timespec="seconds") if started else None,
        seconds=(end - start) / 1000 if start and end else None,
        message="" if entry["status"] in PLAIN else (entry.get("message") or ""),
    )


def as_json(status: Status) -> str:
    return json.dumps(asdict(status), indent=2)


def show(status: Status, console: Console) -> None:
    """Tables for a person."""
    head = f"{status.name or 'cluster'} at {status.dashboard}"
    if status.storage:
        head += f", storage {status.storage}"
    if status.serve:
        head += f", Serve on {status.serve}"
    console.print(Text(head))
    console.print(Group(_nodes(status), _applications(status), _jobs(status)))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _nodes(status: Status) -> Table:
    table = _table("\nnode", "\nstate", "\nresources", "\nlabels")
    for one in status.nodes:
        counts = ", ".join(f"{name} {count:g}" for name, count in one.resources.items()) or "-"
        labels = ", ".join(f"{name}={value}" for name, value in one.labels.items()) or "-"
        state = "alive" if one.alive else f"dead {one.message}".strip()
        table.add_row(f"{one.type}{' (head)' if one.head else ''}", state, counts, labels)
    return table


def _applications(status: Status) -> Table | Text:
    if not status.applications:
        return Text("\nno application; `axicon deploy` puts one there")
    table = _table("\napplication", "\nstatus", "\nreplicas", "\nmessage")
    for one in status.applications:
        run = sum(state == "RUNNING" for state in one.replicas)
        table.add_row(one.name, one.status.lower(), f"{run} of {one.wanted}", one.message or "-")
    return table


def _jobs(status: Status) -> Table | Text:
    if not status.jobs:
        return Text("\nno job")
    table = _table("\njob", "\nstatus", "\nseconds", "\nwhat", "\nmessage")
    for one in status.jobs:
        took = "-" if one.seconds is None else f"{one.seconds:.0f}"
        what = one.entrypoint.removeprefix("exec ")
        what = what if len(what) <= 60 else f"{what[:57]}..."
        message = one.message.strip().splitlines()[-1][:120] if one.message.strip() else "-"
        table.add_row(one.id, one.status.lower(), took, what, message)
    return table
