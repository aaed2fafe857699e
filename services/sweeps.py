"""`/sweeps`: the sweeps of one folder, to be read in a browser while they run.

Three things leave the folder: which sweeps are in it, a summary of each, and the document `sweep.json` of
one. The page that shows them comes from the package (`jobs/pages`) and never from the folder, so a sweep
that somebody else made brings no script along. Files are opened one step at a time beneath the folder and
links are followed nowhere, so no name leads out of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response

from services.errors import ApiError, Json

SHELLS = Path(__file__).parent / "pages"
# The parts of the page that `jobs` puts into one file. They are read, not imported: jobs know no services.
PAGES = Path(__file__).parents[1] / "jobs" / "pages"
PARTS = tuple(sorted(path.name for path in PAGES.glob("*.*s*") if path.suffix in (".js", ".css")))
DOCUMENT = "sweep.json"
SHOWN = ("name", "verb", "status", "started", "updated", "seconds", "wanted")
MOST_BYTES = 128 * 2**20
"""Of a document. Thousands of trials with their curves take a tenth of it."""


class Found(NamedTuple):
    """A document as it was when it was read."""

    content: bytes
    tag: str
    """An ETag: it differs when the file was replaced."""


class Sweeps:
    """The sweeps of `folder`, which may also be a sweep itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._summaries: dict[str, tuple[str, dict[str, Any]]] = {}

    def names(self) -> list[str]:
        """Names of the sweeps, in order. Raises ApiError 404 without the folder."""
        try:
            if self._is_sweep():
                return [self.folder.name]
            with os.scandir(self.folder) as entries:
                inside = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            message = f"The folder of sweeps cannot be read: {error.strerror}. It is sweeps= of the recipe."
            raise ApiError(404, message, code="no_sweeps") from error
        return sorted(entry.name for entry in inside if _regular(Path(entry.path) / DOCUMENT))

    def read(self, name: str) -> Found:
        """The document of one sweep. Raises ApiError 404 for what is none, 500 for one too large."""
        try:
            descriptor = self._open(name)
        except (OSError, ValueError) as error:
            raise ApiError(404, f"There is no sweep {name[:200]!r} here.", code="no_sweep") from error
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_size > MOST_BYTES:
                raise ApiError(500, f"{DOCUMENT} of this sweep is too large to be shown.", code="too_large")
            return Found(file.read(), f'"{about.st_ino:x}-{about.st_mtime_ns:x}-{about.st_size:x}"')

    def index(self) -> list[dict[str, Any]]:
        """A summary of every sweep. A document is read again only when it has changed."""
        return [self._summary(name) for name in self.names()]

    def _is_sweep(self) -> bool:
        return _regular(self.folder / DOCUMENT)

    def _open(self, name: str) -> int:
        """A descriptor of the document. Raises OSError, ValueError for a name with a zero byte."""
        at = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not (self._is_sweep() and name == self.folder.name):
                if name.startswith(".") or "/" in name or not name:
                    raise FileNotFoundError(name)
                above, at = at, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(above)
            # A pipe of that name would make an ordinary open wait for a writer.
            descriptor = os.open(DOCUMENT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(name)
        return descriptor

    def _summary(self, name: str) -> dict[str, Any]:
        try:
            found = self.read(name)
            tag, known = self._summaries.get(name, ("", {}))
            if tag != found.tag:
                known = {"sweep": name, **summary(json.loads(found.content))}
                self._summaries[name] = (found.tag, known)
            return known
        except (ApiError, ValueError, KeyError, TypeError, AttributeError):
            return {"sweep": name, "status": "unreadable"}


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the list says of one sweep. Raises KeyError or TypeError for a document of another form."""
    trials = document["trials"]
    best = next((trial for trial in trials if trial["trial"] == document["best"]), None)
    figures = {} if best is None else best["metrics"]
    return {
        **{key: document[key] for key in SHOWN},
        "ended": sum(trial["status"] != "running" for trial in trials),
        "failed": sum(trial["status"] == "failed" for trial in trials),
        "best": document["best"],
        "figures": {one["metric"]: figures.get(one["metric"]) for one in document["objectives"]},
    }


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def add_sweeps(api: FastAPI, get_folder: Callable[[], Path | None], headers: Mapping[str, str]) -> None:
    """The routes. Pages and their parts answer without a key, as they hold nothing: what is in the folder
    comes as JSON, which asks for one. `headers` are those of every page."""
    kept: dict[Path, Sweeps] = {}

    def sweeps() -> Sweeps:
        folder = get_folder()
        if folder is None:
            message = "This server shows no sweeps. Start it with sweeps=DIR."
            raise ApiError(404, message, code="no_sweeps")
        return kept.setdefault(folder, Sweeps(folder))

    def page(path: str, file: Path) -> None:
        @api.get(path)
        async def get() -> Response:
            sweeps()
            return FileResponse(file, headers=dict(headers))

    page("/sweeps", SHELLS / "sweeps.html")
    page("/sweeps/pages/sweeps.js", SHELLS / "sweeps.js")
    for part in PARTS:
        page(f"/sweeps/pages/{part}", PAGES / part)

    @api.get("/sweeps/index.json")
    async def index() -> Response:
        return Json({"sweeps": await asyncio.to_thread(sweeps().index)}, headers=dict(headers))

    @api.get("/sweeps/{name}/sweep.html")
    async def shell(name: str) -> Response:
        sweeps()
        return FileResponse(PAGES / "sweep.html", headers=dict(headers))

    @api.get("/sweeps/{name}/sweep.json")
    async def document(name: str, request: Request) -> Response:
        found = await asyncio.to_thread(sweeps().read, name)
        tagged = {**headers, "ETag": found.tag}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=tagged)
        return Response(found.content, media_type="application/json", headers=tagged)
