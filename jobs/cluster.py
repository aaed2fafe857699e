"""Ray on this machine: the one node of `axicon serve`, or the node table of a cluster.yaml, simulated.

`local_ray` and `simulated` start Ray with everything it needs in a private folder, on loopback, with a
token of its own, and end every process they started, however the block is left. Several run beside each other
without meeting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from axicon.errors import AxiconError
from jobs.cluster_file import ClusterFile, LocalNode, Metadata, NodeType
from jobs.stop import rearm

LONGEST_BASE = 20
"""Characters. HAProxy takes socket paths of 97, and Ray puts a node's name of 57 into them."""


Nodes = Literal["table", "local"]


@dataclass(frozen=True, slots=True)
class Simulated:
    """A cluster of this machine that runs."""

    folder: Path
    gcs: str
    """host:port of the control plane."""
    dashboard: str
    """URL of the dashboard, which is also where jobs are submitted."""


def free_ports(count: int) -> list[int]:
    """Loopback TCP ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def private_folder() -> Path:
    """A new folder that only this user can enter, with a path that leaves room for the names of sockets."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ax-", dir=base if len(base) <= LONGEST_BASE else "/tmp"))


def environment(metadata: Metadata, folder: Path) -> dict[str, str]:
    """All that Ray must find in the environment; what it would share with others is moved to `folder`."""
    stats, metrics, fallback = free_ports(3)
    env = {
        **metadata.env,
        **metadata.local.env,
        # `python` of a job is the one that runs here.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
    }
    if binary := proxy():
        env["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(binary)
    else:
        env["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    return env


def proxy() -> Path | None:
    """`axicon-haproxy`, where there is an HAProxy for it to run: Ray ships one for Linux."""
    script = Path(sysconfig.get_path("scripts")) / "axicon-haproxy"
    return script if sys.platform.startswith("linux") and script.exists() else None


@contextlib.contextmanager
def local_ray(
    metadata: Metadata,
    before_start: Callable[[], None] = lambda: None,
    dashboard_port: int | None = None,
    *,
    debug: bool = False,
) -> Iterator[Path]:
    """Ray on this machine for the time of the block. Yields its private folder, where its logs are.

    Ray reads its settings at import, so this must run before anything imports it. `before_start` is called
    when it is imported and nothing runs yet; what it raises ends the matter. Raises AxiconError when Ray
    cannot be started.
    """
    with _private(metadata) as folder:
        from ray import serve  # noqa: F401 - slow, so it is done while others may be at work

        if not debug:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        before_start()
        _start(metadata.local, folder, dashboard_port, debug)
        try:
            yield folder
        finally:
            with contextlib.nullcontext() if debug else _quiet():
                _shut_down()


def _start(node: LocalNode, folder: Path, dashboard_port: int | None, debug: bool) -> None:
    import ray

    counts = dict(node.resources)
    try:
        ray.init(
            address="local",
            num_cpus=counts.pop("CPU", 0),
            num_gpus=counts.pop("GPU", None),
            resources={name: float(count) for name, count in counts.items()} or None,
            object_store_memory=node.object_store_mib * 2**20,
            include_dashboard=dashboard_port is not None,
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard_port,
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.ERROR,
        )
        rearm()
    except Exception as error:
        raise _not_started(error) from error


@contextlib.contextmanager
def simulated(
    file: ClusterFile, nodes: Nodes, dashboard_port: int, say: Callable[[str], None]
) -> Iterator[Simulated]:
    """The node table of `file`, or the one node of `metadata.local`, as Ray nodes of this machine.

    Every worker type gets its `min_workers`; if that makes none, the first type gets one. Serve and jobs
    find them as they would find machines, resources and labels included. Raises AxiconError.
    """
    node = file.metadata.local
    with _private(file.metadata) as folder:
        from ray.cluster_utils import Cluster

        head, workers = node_list(file, nodes)
        common: dict[str, Any] = {
            "node_ip_address": "127.0.0.1",
            "object_store_memory": node.object_store_mib * 2**20,
        }
        try:
            cluster = Cluster()
            ports = {"dashboard_port": dashboard_port, "dashboard_agent_listen_port": 0, "gcs_server_port": 0}
            _add(cluster, head, common, include_dashboard=True, dashboard_host="127.0.0.1", **ports)
            say(f"node {head.name} runs")
            for number, worker in enumerate(workers, start=1):
                _add(cluster, worker, common)
                say(f"node {worker.name} runs ({number} of {len(workers)})")
        except Exception as error:
            raise _not_started(error) from error
        try:
            yield Simulated(folder, cluster.address, f"http://{cluster.webui_url}")
        finally:
            with _quiet(), contextlib.suppress(Exception):
                cluster.shutdown()


def node_list(file: ClusterFile, nodes: Nodes) -> tuple[NodeType, list[NodeType]]:
    """The head and every worker that `simulated` starts. Without a node table that is one node."""
    if nodes == "local" or not any(node.resources for node in file.workers):
        return NodeType("local", dict(file.metadata.local.resources), {}, 0, 0), []
    workers = [node for node in file.workers for _ in range(node.min_workers)]
    return file.head, workers or [file.workers[0]]


def _add(cluster: Any, node: NodeType, common: Mapping[str, Any], **more: Any) -> None:
    """One more node. Ray takes its type from the environment, as the launcher sets it on a real one."""
    counts = dict(node.resources)
    os.environ["RAY_NODE_TYPE_NAME"] = node.name
    cluster.add_node(
        num_cpus=counts.pop("CPU", 0),
        num_gpus=counts.pop("GPU", 0),
        resources={name: float(count) for name, count in counts.items()},
        labels=node.labels,
        **common,
        **more,
    )


def _not_started(error: Exception) -> AxiconError:
    reason = " ".join(str(error).split())[:300]
    return AxiconError(
        f"Ray could not be started ({reason}); see `axicon doctor`, or more of it with AXICON_DEBUG=1"
    )


def _shut_down() -> None:
    """End Serve and Ray in their own way. What does not end is ended by the caller."""
    import ray
    from ray import serve

    with contextlib.suppress(Exception):
        serve.shutdown()
    with contextlib.suppress(Exception):
        ray.shutdown()


@contextlib.contextmanager
def _private(metadata: Metadata) -> Iterator[Path]:
    """A new folder with a token, and the environment for a Ray that keeps everything in it."""
    if "ray" in sys.modules:
        raise RuntimeError("this must run before ray is imported: Ray would not see its settings")
    folder = private_folder()
    with _reaped(folder), _variables(environment(metadata, folder)):
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        yield folder


@contextlib.contextmanager
def _reaped(folder: Path) -> Iterator[None]:
    """When the block is left, or this process killed in it, `folder` goes, and every process that uses it.

    The one who sees to it has a session of its own, where no Ctrl-C of a terminal reaches it.
    """
    command = [sys.executable, "-m", "jobs.reaper", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield  # leaving closes its standard input, which it waits for, and waits for its end


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray says at its end: it calls the end of its own controller a failure, which it is not."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        yield


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """The environment with these values, and without Ray addresses from outside."""
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE"):
        os.environ.pop(name, None)
    os.environ |= values
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
