"""Talking to a cluster through Ray's dashboard: which cluster, its token, and what it says over HTTP.

A cluster is one of this machine by its name (jobs/running.py), or any by `address=URL` with the token from
where Ray itself takes it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from axicon.errors import AxiconError, RunFailed
from jobs import running

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TIMEOUT_S = 30.0
TOKEN_FILE = Path("~/.ray/auth_token")


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One cluster, as far as HTTP reaches."""

    url: str
    token: str = field(repr=False)
    token_from: str
    """Where the token was found, for messages."""
    cluster: running.Running | None = None
    """What this machine knows of it, if it runs here."""

    @property
    def host(self) -> str:
        """Its address, as it is reached from here."""
        return urlsplit(self.url).hostname or ""

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises AxiconError when nobody answers or the token is wrong."""
        return self._ask("GET", path)

    def post(self, path: str) -> Any:
        """What a request without a body is answered with. Raises AxiconError as `get` does."""
        return self._ask("POST", path)

    def _ask(self, method: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.url + path, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read().decode(errors="replace")) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise self._unreachable(str(reason)) from None
        except ValueError:
            raise self._no_dashboard() from None

    def jobs(self) -> JobSubmissionClient:
        """Ray's own client. Raises AxiconError as `get` does, before Ray is imported."""
        self.get("/api/version")
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # they tell of every step of an upload
            logging.getLogger(name).setLevel(logging.ERROR)
        return JobSubmissionClient(self.url)

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[None]:
        """The time of the block, Ray's clients in this process reach this cluster and no other.

        Enter it before Ray is imported.
        """
        before = dict(os.environ)
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            os.environ.pop(name, None)
        os.environ |= {"RAY_API_SERVER_ADDRESS": self.url}
        if self.token:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before

    def _unreachable(self, reason: str) -> AxiconError:
        return AxiconError(
            f"no cluster answers at {self.url} ({reason}); "
            "`axicon up` starts one on this machine"
        )

    def _no_dashboard(self) -> AxiconError:
        return AxiconError(f"what answers at {self.url} is no dashboard of Ray; give another address=")

    def _refused(self, code: int, body: str) -> AxiconError:
        if code in (401, 403):
            what = f"the token from {self.token_from}" if self.token else "a request without a token"
            # It goes before the file.
            first = "unset RAY_AUTH_TOKEN and " if self.token_from == "RAY_AUTH_TOKEN" else ""
            return AxiconError(
                f"the cluster at {self.url} refuses {what}; {first}name the file with its own in "
                "RAY_AUTH_TOKEN_PATH"
            )
        if code == 404:
            return self._no_dashboard()
        said = " ".join(body.split())[:300]
        return RunFailed(f"the cluster at {self.url} answers with an error ({code}: {said})")


def find(name: str | None = None, address: str | None = None) -> Dashboard:
    """The cluster at `address`, or the one of this name on this machine, or the only one there is.

    Raises AxiconError. Whether it answers shows with the first request.
    """
    if address is None:
        cluster = running.find(name)
        token = _read_token(Path(cluster.token_path))
        return Dashboard(cluster.dashboard, token, cluster.token_path, cluster)
    if name is not None:
        raise AxiconError(f"address {address} and name {name} are two clusters; give one of them")
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AxiconError(f"address={address}: give the URL of the dashboard, such as http://127.0.0.1:8265")
    token, origin = _own_token()
    return Dashboard(f"{parts.scheme}://{parts.netloc}", token, origin)


def _own_token() -> tuple[str, str]:
    """(token, where it is from) by Ray's own rules; empty when there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip(), "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read_token(Path(path).expanduser()), path
    usual = TOKEN_FILE.expanduser()
    return (_read_token(usual), str(TOKEN_FILE)) if usual.exists() else ("", "")


def _read_token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise AxiconError(f"the token in {path} cannot be read ({reason}); set RAY_AUTH_TOKEN_PATH") from None
