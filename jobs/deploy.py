"""`axicon deploy`: the Serve applications of a cluster.yaml, on a cluster that runs.

The code goes along as the files of a job, which hands the applications to Serve (services/__main__.py,
started by name: jobs never import services). Then Serve is watched until every application runs, or says why
it cannot. A second deploy replaces what changed, replica by replica.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from axicon.errors import AxiconError, RunFailed
from axicon.recipe import ServeRecipe
from axicon.settings import Recipe
from jobs import cluster_file, dashboard, upload
from jobs.address import check_free, only_this_machine, reachable
from jobs.cluster_file import OUR_APPLICATION, ClusterFile
from jobs.dashboard import Dashboard
from jobs.progress import Reporter
from jobs.serve import curl, failure

APPLICATIONS = "/api/serve/applications/"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 0.5

Config = dict[str, Any]
"""A Serve configuration as plain data, with `http_options` and `applications`."""


class DeployRecipe(Recipe):
    """What to serve, and on which cluster."""

    cluster: Path | None = Field(None, description="the cluster.yaml; none: the one the cluster runs from")
    name: str | None = Field(None, min_length=1, description="cluster of this machine; none: the only one")
    address: str | None = Field(None, description="URL of a dashboard; its token in RAY_AUTH_TOKEN_PATH")
    host: str | None = Field(
        None,
        min_length=1,
        description="where Serve listens; none: 127.0.0.1 here, elsewhere as the file says",
    )
    port: int | None = Field(None, ge=1, le=65535, description="its port; none: as the file says")
    ready_s: float = Field(600, gt=0, description="give up when not all answer within this time")


def run(recipe: DeployRecipe, *, say: Callable[[str], None] = print) -> None:
    """Deploy, and return when every application runs. Raises AxiconError; RunFailed when one cannot."""
    begin, reporter = time.monotonic(), Reporter()
    target = dashboard.find(recipe.name, recipe.address)
    here = target.cluster is not None
    file = cluster_file.read(recipe.cluster or _file_of(target))
    config, notes = configuration(file, recipe, here=here)
    _check_place(target.get(APPLICATIONS), config, here=here)
    for note in [*notes, *([] if here else file.warnings())]:
        reporter.say(f"note: {note}")
    reporter.say(f"sending the code to {target.url}")
    _hand_over(target, config)
    _wait_until_running(target, config, begin + recipe.ready_s, reporter)
    say(f"ready after {time.monotonic() - begin:.1f} s")
    for line in addresses(config, target):
        say(line)


def _file_of(target: Dashboard) -> Path | None:
    return Path(target.cluster.cluster_file) if target.cluster else None


def configuration(file: ClusterFile, recipe: DeployRecipe, *, here: bool) -> tuple[Config, list[str]]:
    """What Serve is told, and what the user should know of it. `here`: the cluster is on this machine.

    Raises AxiconError when it would listen beyond loopback without keys.
    """
    config = file.serve.as_config()
    http = file.serve.http_options
    host = recipe.host or ("127.0.0.1" if here else http.host)
    config["http_options"] = config.get("http_options", {}) | {"host": host, "port": recipe.port or http.port}
    if here:
        config["proxy_location"] = "HeadOnly"  # its nodes share one address, so one proxy is all of them
    notes = []
    for application in config["applications"]:
        if application["import_path"] == OUR_APPLICATION:
            args, said = _arguments(application, host, file.path.resolve().parent if here else None)
            application["args"] = args
            notes += said
    return config, notes


def _arguments(application: Config, host: str, folder: Path | None) -> tuple[Config, list[str]]:
    """The arguments of our application; `folder`: that of cluster.yaml, if this machine is the cluster."""
    args, notes, name = dict(application.get("args", {})), [], application.get("name", "default")
    recipe = ServeRecipe.parse(**args)
    if (key := recipe.api_keys_env) is not None:
        try:
            # Digests travel, keys do not.
            args["api_key_hashes"] = [digest.hex() for digest in recipe.api_key_digests()]
            del args["api_keys_env"]
        except AxiconError:
            # Elsewhere the variable is set where the cluster's processes start; build() looks there.
            if folder is not None:
                if not only_this_machine(host):
                    raise
                del args["api_keys_env"]
                notes.append(f"{key} holds no key here: {name} answers this machine only, and without keys")
    if recipe.admin_keys_env is not None and (folder is not None or recipe.admin_keys_env in os.environ):
        args["admin_key_hashes"] = [digest.hex() for digest in recipe.admin_key_digests()]
        del args["admin_keys_env"]
    open_to_all = not (args.get("api_key_hashes") or args.get("api_keys_env") or recipe.allowed_hosts)
    if open_to_all and not only_this_machine(host):
        raise AxiconError(
            f"host={host} can be reached by others, and {name} has no API keys; name a variable that holds "
            "them with api_keys_env in its args, or deploy with host=127.0.0.1"
        )
    if folder is not None and (folder / recipe.model).exists():
        args["model"] = str(folder / recipe.model)  # a replica's own folder is the code that came along
    return args, notes


def _check_place(serve: dict[str, Any], config: Config, *, here: bool) -> None:
    """Raises AxiconError when Serve runs elsewhere already, or cannot listen where it is asked to."""
    http, now = config["http_options"], serve.get("http_options") or {}
    if not now:
        if here:
            found = socket.getaddrinfo(http["host"], http["port"], type=socket.SOCK_STREAM)
            check_free("port", found[0][0], found[0][4])
    elif (now.get("host"), now.get("port")) != (http["host"], http["port"]):
        host, port = now.get("host"), now.get("port")
        raise AxiconError(
            f"Serve on this cluster listens on {host}:{port} and keeps that until it is shut down; "
            f"deploy with host={host} port={port}, or run `serve shutdown` first"
        )


def _hand_over(target: Dashboard, config: Config) -> None:
    """Run the job that gives the code and the configuration to Serve. Raises RunFailed with its reason."""
    name = f"deploy-{uuid.uuid4().hex[:8]}"
    with target.in_environment(), upload.packages() as folder:
        client = target.jobs()
        client.submit_job(
            entrypoint=f"python -m services {shlex.quote(json.dumps(config))}",
            submission_id=name,
            runtime_env={"working_dir": str(folder)},
        )
    while (job := target.get(f"/api/jobs/{name}"))["status"] not in ENDED:
        time.sleep(POLL_S)
    if job["status"] != "SUCCEEDED":
        log = target.get(f"/api/jobs/{name}/logs")["logs"].rstrip() or str(job["message"])
        raise RunFailed(
            f"the job {name}, which hands the applications to Serve, failed: {log.splitlines()[-1]}"
        )


def _wait_until_running(target: Dashboard, config: Config, deadline: float, reporter: Reporter) -> None:
    """Return when all run, saying what changes on the way. Raises RunFailed."""
    names = [application.get("name", "default") for application in config["applications"]]
    said: dict[str, str] = {}
    while True:
        found = target.get(APPLICATIONS)["applications"]
        states = {name: found[name] for name in names if name in found}
        for name, application in states.items():
            line = progress(name, application)
            if said.get(name) != line:
                said[name] = line
                reporter.say(line)
            if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RunFailed(f"{name}: {application['status']}: {reason(application)}")
        if len(states) == len(names) and all(one["status"] == "RUNNING" for one in states.values()):
            return
        if time.monotonic() > deadline:
            raise RunFailed(
                f"not all applications run in time: {'; '.join(said.values())}; allow more with ready_s="
            )
        time.sleep(POLL_S)


def progress(name: str, application: dict[str, Any]) -> str:
    """One line on how far an application is."""
    parts = []
    for deployment in application["deployments"].values():
        replicas = deployment["replicas"]
        running = sum(replica["state"] == "RUNNING" for replica in replicas)
        parts.append(f"{deployment['name']} {running} of {deployment['target_num_replicas']} replicas run")
        if deployment["message"] and not running:
            parts.append(deployment["message"].splitlines()[0])
    return f"{name}: {application['status'].lower()}" + "".join(f", {part}" for part in parts)


def reason(application: dict[str, Any]) -> str:
    """Why an application cannot run: our own line if there is one, or the last of what Serve says."""
    messages = [application["message"], *(one["message"] for one in application["deployments"].values())]
    if found := next((line for line in map(failure, messages) if line), None):
        return found
    lines = "\n".join(messages).strip().splitlines()
    return lines[-1].strip() if lines else "Serve gives no reason; see the dashboard"


def addresses(config: Config, target: Dashboard) -> Iterator[str]:
    """Where each application answers, and a command that asks ours something."""
    http = config["http_options"]
    host = target.host if target.cluster is None else reachable(http["host"])
    scheme = "https" if http.get("ssl_certfile") else "http"
    for application in config["applications"]:
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{http['port']}"
        url += (application.get("route_prefix") or "/").rstrip("/")
        line = f"{application.get('name', 'default')} answers at {url}"
        if application["import_path"] == OUR_APPLICATION:
            line += f"   try: {curl(url, ServeRecipe.parse(**application['args']))}"
        yield line
