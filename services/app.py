"""The deployable unit: `services.app:build`, the one place where the server meets Ray Serve.

One deployment answers HTTP and owns the engine. Annotations are not postponed here: Serve looks at the
builder's parameter for a class to validate its arguments with.
"""

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.auth import is_loopback
from services.generation import GenerationServer
from services.ingress import make_api

SPARE = 64
"""Requests beside generation (health, figures, models, tokenizing) that must get through while the engine is
full."""


class Generator(GenerationServer):
    """A replica."""

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve awaits this before it sends the first request, so a replica is up once its model is loaded,
        and a model that cannot be loaded is reported as what it is."""
        close_peer_port()
        if not self.access.closed_to_strangers:
            check_bind(await asyncio.to_thread(serve_host))
        await self.start()
        return make_api(lambda: self)

    async def __del__(self) -> None:
        await self.close()


def serve_host() -> str:
    """Where the Serve around this replica listens, whoever configured it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    if client is None:
        raise RuntimeError("this replica does not find its Serve")
    return str(client.http_config.host)


def check_bind(host: str) -> None:
    """Raises AxiconError when a server without keys would listen beyond loopback.

    A proxy stands between, so what arrives comes from this machine whoever sent it, and `Host` is what the
    sender writes: only where Serve listens tells who can ask.
    """
    if not is_loopback(host):
        raise AxiconError(
            f"Serve listens on {host}, where others reach it, and no API keys are configured; name a "
            "variable that holds them with api_keys_env, or let http_options.host be 127.0.0.1"
        )


def close_peer_port() -> None:
    """Keep Serve from opening this replica to calls by other deployments, which it does once this is up.

    Serve opens that port on every interface, asks for no token, and unpickles what arrives: whoever reaches
    it runs code here. No setting turns it off. Nothing calls this deployment but HTTP: it gets no such port.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise RuntimeError("this Ray opens its replicas in a way that axicon does not know how to close")
    replica.add_port_to_grpc_server = lambda server, address: 0


def build(args: ServeRecipe) -> Application:
    """The application that serves what `args` says. Raises AxiconError for keys that are asked for and
    missing.

    Keys from the environment are resolved here, where the person who starts the server has set them; replicas
    get digests only.
    """
    digests = tuple(digest.hex() for digest in args.api_key_digests())
    admins = tuple(digest.hex() for digest in args.admin_key_digests())
    recipe = args.model_copy(
        update={
            "api_key_hashes": digests, "api_keys_env": None, "admin_key_hashes": admins,
            "admin_keys_env": None,
        }
    )  # fmt: skip
    deploy = serve.deployment(
        name="Generator",
        # Our own refusal (429 with an error body and an estimated Retry-After) comes first.
        max_ongoing_requests=recipe.max_rows + recipe.max_queue + SPARE,
        max_queued_requests=SPARE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=20,
        # A model that cannot be loaded cannot be loaded the second time either.
        max_constructor_retry_count=1,
        # The new one answers before the old one goes, and if it cannot start, the old one stays.
        max_surge_percent=100,
        # Ray hides GPUs from those who do not ask for one.
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if recipe.device == "cuda" else 0},
    )
    return deploy(serve.ingress()(Generator)).bind(recipe)
