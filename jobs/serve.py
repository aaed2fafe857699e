"""`axicon serve`: an endpoint on this machine, from nothing to a request to try, and back to nothing.

What can be wrong with a recipe is found out first, in a second and in one line: keys, address, port, model,
memory. Only then is Ray started. The application is named by its import string, so no job imports a service.
"""

from __future__ import annotations

import http.client
import importlib
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from axicon.errors import AxiconError, RunFailed
from axicon.recipe import LocalServeRecipe, ServeRecipe
from jobs import cluster, cluster_file
from jobs.address import check_address, reachable
from jobs.prepare import Preparation
from jobs.progress import Reporter
from jobs.stop import Stopped, stop_on_signal

APPLICATION = "generate"
IMPORT_PATH = "services.app:build"
POLL_S = 0.2


def run(recipe: LocalServeRecipe, *, say: Callable[[str], None] = print, debug: bool = False) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises AxiconError for everything that a user can mend."""
    begin, reporter = time.monotonic(), Reporter()
    with stop_on_signal():
        try:
            check_address(recipe)
            metadata = cluster_file.read(recipe.cluster).metadata
            reporter.say(f"looking at the model {recipe.model}")

            def check_model() -> None:
                model.result()
                reporter.say("starting Ray on this machine")

            with (
                Preparation(recipe) as model,
                cluster.local_ray(metadata, check_model, recipe.dashboard_port, debug=debug) as folder,
            ):
                resolved = model.result()
                reporter.say(f"loading {resolved.served_name}")
                deploy(resolved)
                wait_until_ready(resolved)
                say(ready_line(resolved, time.monotonic() - begin))
                reporter.say(f"logs are in {folder}/ray/session_latest/logs until it ends; Ctrl-C ends it")
                if recipe.dashboard_port:
                    reporter.say(jobs_line(recipe.dashboard_port, folder))
                watch()
        except Stopped:
            reporter.say("stopped")


def deploy(recipe: LocalServeRecipe) -> None:
    """Start Serve and hand it the application. Returns before the model is loaded."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": recipe.host, "port": recipe.port})
    module, _, name = IMPORT_PATH.partition(":")
    build = getattr(importlib.import_module(module), name)
    application = build(ServeRecipe.model_validate(recipe.app_args()))
    serve.run_many(
        [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def wait_until_ready(recipe: LocalServeRecipe) -> None:
    """Return when `/health` answers 200. Raises AxiconError with the reason when the replica cannot start."""
    from ray import serve

    deadline = time.monotonic() + recipe.ready_s
    while not healthy(recipe.host, recipe.port):
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            messages = [application.message, *(d.message for d in application.deployments.values())]
            if reason := next((found for found in map(failure, messages) if found), None):
                raise AxiconError(reason)
            if application.status == "DEPLOY_FAILED":
                last = "\n".join(messages).rstrip().splitlines()[-1]
                raise RunFailed(f"the replica could not start ({last}); AXICON_DEBUG=1 shows all of it")
        if time.monotonic() > deadline:
            raise RunFailed(
                f"ready_s={recipe.ready_s:g}: the model did not answer in this time; "
                "allow more, or see with AXICON_DEBUG=1 what it waits for"
            )
        time.sleep(POLL_S)


def failure(message: str) -> str | None:
    """The line of an AxiconError inside a traceback that Ray has put into a message."""
    _, found, text = message.rpartition("AxiconError: ")
    return text.splitlines()[0].strip() if found and text.strip() else None


def healthy(host: str, port: int) -> bool:
    """Whether `GET /health` answers 200."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ready_line(recipe: LocalServeRecipe, seconds: float) -> str:
    """One line: what serves, since when, and a command that proves it."""
    host = reachable(recipe.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{recipe.port}"
    return f"{recipe.served_name} is ready after {seconds:.1f} s at {url}   try: {curl(url, recipe)}"


def curl(url: str, recipe: ServeRecipe) -> str:
    """A command that asks a server at `url` something."""
    body = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 60}
    keyed = bool(recipe.api_key_hashes or recipe.api_keys_env)
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"{shlex.join(words)}{key} -d {shlex.quote(json.dumps(body))}"


def jobs_line(port: int, folder: Path) -> str:
    """How to submit a job to this cluster from another terminal."""
    words = f"--address http://127.0.0.1:{port} evaluate MODEL text=FILE"
    return f"jobs: RAY_AUTH_TOKEN_PATH={folder}/token axicon submit {words}"


def watch() -> None:
    """Return never, but raise when Ray's own processes have ended (Serve replaces a replica by itself)."""
    ours = [p for p in psutil.Process().children() if p.name() in ("raylet", "gcs_server")]
    while True:
        time.sleep(1)
        gone: list[Any] = [p for p in ours if not p.is_running() or p.status() == psutil.STATUS_ZOMBIE]
        if gone:
            raise RunFailed(f"Ray's {gone[0].name()} has ended, perhaps for want of memory; start again")
