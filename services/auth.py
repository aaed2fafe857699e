"""Who may ask: API keys, and without keys the machine itself.

Keys are configured as SHA-256 digests or through an environment variable and only their digests are kept. A
request is compared with every configured digest in constant time. Without keys the server binds loopback
only (a replica asks its Serve, see services/app.py), and a request must also name a loopback host: otherwise
any web page could reach it by pointing a name of its own at 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Callable, Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import ApiError, api_error

log = logging.getLogger("axicon")

OPEN = frozenset({"/", "/health", "/pages/playground.js", "/pages/playground.css", "/pages/icon.svg"})
"""Paths that answer without a key."""
ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Paths that change what is served."""
OPEN_SWEEPS = re.compile(r"/sweeps(/[^/]+/sweep\.html|/pages/[\w-]+\.(js|css))?")
"""The empty pages of sweeps and their parts; what they show is asked for with the key."""


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


class Access:
    """Decides about one request from where it comes, its path and its headers."""

    def __init__(
        self, digests: Iterable[bytes] = (), hosts: Iterable[str] = (), admins: Iterable[bytes] = ()
    ) -> None:
        """`digests`: SHA-256 digests of keys. `hosts`: further host names to answer to when there are no
        keys; whoever sets them takes it on himself who can connect. `admins`: digests of keys that may do
        everything; nobody else may change what is served."""
        self.admins = tuple(admins)
        self.digests = (*(own := tuple(digests)), *(self.admins if own else ()))
        self.hosts = frozenset(host.lower() for host in hosts)

    @property
    def closed_to_strangers(self) -> bool:
        """Whether someone has decided who may connect: by keys, or by naming the hosts to answer to."""
        return bool(self.digests or self.hosts)

    def check(self, path: str, headers: Headers, peer: str | None = None) -> None:
        """`peer`: the address that the connection comes from. Raises ApiError 401 or 403."""
        if path in ADMIN:
            self._check_admin(headers.get("authorization", ""))
        if self.digests:
            if path not in OPEN and not OPEN_SWEEPS.fullmatch(path):
                self._check_key(headers.get("authorization", ""))
        elif not self.hosts and peer is not None and not is_loopback(peer):
            raise ApiError(
                403, "Without API keys this server answers only its own machine.", code="peer_not_allowed"
            )
        else:
            self._check_host(headers.get("host", ""))

    def namespace(self, headers: Headers) -> str:
        """What tells callers apart whom `check` let in: one for each key, and one where there are none."""
        return digest(_key_of(headers.get("authorization", ""))).hex() if self.digests else ""

    def _check_admin(self, authorization: str) -> None:
        if authorization and not self.admins:
            raise ApiError(
                403, "Nobody may change what this server serves: it was started without admin_keys_env.",
                code="no_admin_keys",
            )  # fmt: skip
        if _holds(self.digests, authorization) and not _holds(self.admins, authorization):
            raise ApiError(403, "This takes an admin key.", code="admin_key_required")
        self._check_key(authorization, self.admins)

    def _check_key(self, authorization: str, digests: Sequence[bytes] | None = None) -> None:
        if not _holds(self.digests if digests is None else digests, authorization):
            what = "This API key is not valid." if authorization else "An API key is required."
            headers = {"WWW-Authenticate": 'Bearer realm="axicon"'}
            raise ApiError(
                401, f"{what} Send 'Authorization: Bearer KEY'.", code="invalid_api_key", headers=headers
            )

    def _check_host(self, header: str) -> None:
        host = host_of(header)
        if host not in self.hosts and not is_loopback(host):
            message = "Without API keys this server answers only to loopback host names."
            raise ApiError(403, f"{message} Set API keys or allowed_hosts.", code="host_not_allowed")


def _holds(digests: Iterable[bytes], authorization: str) -> bool:
    """Whether a header offers one of these keys."""
    scheme, offered = authorization.partition(" ")[0], digest(_key_of(authorization))
    # All are compared, whichever matches: time says nothing about the keys.
    matches = [hmac.compare_digest(offered, kept) for kept in digests]
    return scheme.lower() == "bearer" and any(matches)


def _key_of(authorization: str) -> bytes:
    """The key behind the scheme, in the header's own bytes."""
    return authorization.partition(" ")[2].strip().encode("latin-1")


def host_of(header: str) -> str:
    """The host of a `Host` header, without its port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Whether `host` can only mean this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware that asks `Access` before any route does, unknown paths included, and turns a defect of
    a route into a 500 without giving up the connection."""

    def __init__(self, app: ASGIApp, get_access: Callable[[], Access]) -> None:
        self.app = app
        self.get_access = get_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            client = scope.get("client")
            self.get_access().check(path, Headers(scope=scope), client[0] if client else None)
            await self.app(scope, receive, send_on)
        except Exception as error:
            if started:
                raise
            if not isinstance(error, ApiError):
                log.exception("a request to %s failed", scope["path"][:200])
            await api_error(error).response()(scope, receive, send)
