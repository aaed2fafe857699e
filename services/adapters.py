"""Adapters that join and leave a running server, and are chosen by the `model` of a request.

What is loaded stands in one small file in the adapters' folder, which a request for an adapter looks at. So
a replica that starts again, and every replica beside it, serves the same ones; one whose files have changed
since is refused. An adapter that follows a run (`services.followed`) is renewed while requests go on: each
keeps the one it began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.errors import ApiError, bad_request
from services.followed import Followed, open_run

if TYPE_CHECKING:
    from axicon.generate.thread import EngineThread
    from axicon.model.adapterfile import Adapter
    from axicon.model.shape import ModelShape

log = logging.getLogger("axicon")

NAME = re.compile(r"[\w][\w.:/-]{0,127}", re.ASCII)
"""What an adapter may be called."""


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter that requests may ask for."""

    name: str
    number: int
    path: str
    """In the adapters' folder."""
    digest: str
    rank: int
    created: int
    """Seconds since 1970 when this replica took it."""
    verified: bool
    """Its manifest names the digest of this model; an adapter of another program says nothing of its base."""
    step: int = 0
    """Of its run, where it follows one."""
    followed: Followed | None = None

    @property
    def identity(self) -> str:
        """What it is by, whatever comes of it: the digest of its files, or of the run that it follows."""
        return self.digest if self.followed is None else self.followed.digest

    @property
    def behind(self) -> int:
        """Later steps that the log of its run had at the last look."""
        return 0 if self.followed is None else self.followed.known - self.step

    def fingerprint(self, base: str) -> str:
        """`system_fingerprint` of its answers, where `base` is that of answers without it."""
        return f"axicon-{hashlib.sha256(f'{base} {self.digest}'.encode()).hexdigest()[:16]}"


class Adapters:
    """Those of one replica. Lives in its event loop; files are read beside it."""

    def __init__(self, recipe: ServeRecipe, thread: EngineThread) -> None:
        self.recipe, self._thread = recipe, thread
        self.loaded: dict[str, Named] = {}
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._model = ""
        self._base = ""
        self._shape: ModelShape | None = None
        self._seen: tuple[int, int, int] | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self, model: str) -> None:
        """Find out what they are beside, load those that were loaded before, and follow runs until `close`.
        `model` is its name."""
        self._model = model
        if self.recipe.adapters.folder is not None:
            await asyncio.to_thread(self._look)
            await self.sync()
            self._keeper = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """Follow no run any more."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    async def load(self, name: str, path: str, *, follow: bool = False) -> Named:
        """Raises ApiError 400, with nothing changed, for what is no adapter of this model; with `follow`, for
        what is no run that makes one."""
        folder = self._folder()
        if not NAME.fullmatch(name) or name == self._model:
            raise bad_request(
                "'lora_name': up to 128 letters, digits and . : / - _, and not the model's own name.",
                "lora_name",
            )
        await self.sync()
        async with self._changing:
            found = await self._find(folder, path, follow)
            known = self.loaded.get(name)
            if known is not None and known.identity == found.digest:
                return known
            if known is not None:
                raise bad_request(f"'{name}' is another adapter here; unload it first.", "lora_name")
            if len(self.loaded) >= self.recipe.adapters.most:
                raise bad_request(
                    f"{len(self.loaded)} adapters are loaded, the most here; unload one.", "lora_name"
                )
            named = await self._join(name, path, found)
            await asyncio.to_thread(self._remember)
            at = f", at step {named.step} of its run" if follow else ""
            log.info("adapter %s of %s joined: rank %d%s", name, path, named.rank, at)
            return named

    async def unload(self, name: str) -> None:
        """What runs ends as it would. Raises ApiError 404."""
        self._folder()
        await self.sync()
        async with self._changing:
            if name not in self.loaded:
                raise ApiError(404, f"No adapter '{name[:200]}' is loaded.", param="lora_name")
            await self._give_up(name)
            await asyncio.to_thread(self._remember)
            log.info("adapter %s left", name)

    async def sync(self) -> None:
        """Serve what the file says, if it was written since the last look."""
        if self.recipe.adapters.folder is None or self._stamp() == self._seen:
            return
        async with self._changing:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            wanted = await asyncio.to_thread(self._recall)
            for name in self.loaded.keys() - wanted.keys():
                await self._give_up(name)
            for name, (path, identity, follow) in wanted.items():
                if name in self.loaded and self.loaded[name].identity == identity:
                    continue
                if name in self.loaded:
                    await self._give_up(name)
                try:
                    found = await self._find(self._folder(), path, follow)
                    if found.digest != identity:
                        raise bad_request("its files have changed since it was loaded.")
                    await self._join(name, path, found)
                except ApiError as error:
                    log.warning("adapter %s is not served: %s", name, error)
            self._seen = stamp

    def _folder(self) -> Path:
        if self.recipe.adapters.folder is None:
            raise bad_request("This server was started without adapters.folder.", code="unsupported")
        return self.recipe.adapters.folder

    def _look(self) -> None:
        from axicon.model import checkpoint
        from axicon.model.adapterfile import locate

        recipe = self.recipe
        base = locate(recipe.model, offline=recipe.offline, revision=recipe.revision).base
        self._base, self._shape = checkpoint.digest(base), checkpoint.shape_of(base)

    async def _keep_up(self) -> None:
        """Renew what follows a run, every so often; what is far behind, at once."""
        while self._thread.error is None:
            hurries = any(
                one.behind and one.followed is not None and one.followed.trouble is None
                for one in self.loaded.values()
            )
            await asyncio.sleep(0 if hurries else self.recipe.adapters.follow_s)
            for one, run in [(one, one.followed) for one in self.loaded.values()]:
                if run is None:
                    continue
                try:
                    await self._renew(one, run)
                except Exception:
                    log.exception("adapter %s was not renewed", one.name)

    async def _renew(self, named: Named, run: Followed) -> None:
        before = run.trouble
        try:
            await run.catch_up(self._thread)
            if run.steps != named.step:
                await self._swap(named, run)
            run.trouble = None
        except AxiconError as error:
            run.trouble = self._plain(error)
        if run.trouble is not None and run.trouble != before:
            log.warning("adapter %s stays at step %d of its run: %s", named.name, named.step, run.trouble)

    async def _swap(self, named: Named, run: Followed) -> None:
        """Let requests that come have what the run has come to. Those that are here keep what they have."""
        number = next(self._numbers)
        step, found = await run.hold(self._thread, number)
        async with self._changing:
            leaves = number
            if self.loaded.get(named.name) is named:
                self.loaded[named.name] = replace(named, number=number, digest=found.digest, step=step)
                leaves = named.number
            # Requests with the old number are in the engine's queue by now: none is planned across an await.
            await asyncio.to_thread(self._thread.ask, lambda engine: engine.give_up(leaves))

    async def _find(self, folder: Path, path: str, follow: bool) -> Adapter | Followed:
        """Raises ApiError 400 for what is none of this model."""
        from axicon.finetune.log import NAME as LOG
        from axicon.model.adapterfile import is_adapter, read_adapter

        def is_run(place: Path) -> bool:
            return (place / LOG).is_file()

        root = folder.resolve()
        place = self._place(root, path, is_run if follow else is_adapter)
        if place is None:
            what = "run of axicon finetune" if follow else "adapter"
            there = self._place(root, path, is_adapter if follow else is_run) is not None
            other = "; it is an adapter: leave out 'follow'" if follow else '; it is a run: "follow": true'
            raise bad_request(
                f"'lora_path': no {what} there in this server's adapters.folder{other if there else ''}.",
                "lora_path",
            )
        assert self._shape is not None
        most = self.recipe.adapters.rank
        found: Adapter | Followed
        try:
            if follow:
                found = await asyncio.to_thread(open_run, place, most)
            else:
                found = await asyncio.to_thread(read_adapter, place, self._shape, most)
        except (AxiconError, OSError) as error:
            raise bad_request(f"'lora_path': {self._plain(error)}", "lora_path") from None
        if found.base is not None and found.base != self._base:
            raise bad_request(
                f"'lora_path': trained on a model with digest {found.base[:12]}, this server's has "
                f"{self._base[:12]}; an adapter fits its own base alone.",
                "lora_path", "base_differs",
            )  # fmt: skip
        return found

    def _plain(self, error: Exception) -> str:
        """What it says, without where the folder lies."""
        return str(error).replace(f"{self._folder().resolve()}/", "")

    def _place(self, root: Path, path: str, holds: Callable[[Path], bool]) -> Path | None:
        """A folder beneath `root` of which that holds."""
        try:
            place = (root / path).resolve()
            return place if place.is_relative_to(root) and holds(place) else None
        except (OSError, ValueError):  # a name that no file system has
            return None

    async def _join(self, name: str, path: str, found: Adapter | Followed) -> Named:
        """Raises ApiError 400 where this server or this model cannot have it."""
        assert self._shape is not None
        number, run, step = next(self._numbers), None, 0
        try:
            if isinstance(found, Followed):
                run = found
                await run.begin(self._thread, self._shape)
                step, adapter = await run.hold(self._thread, number)
            else:
                adapter = found
                await asyncio.to_thread(self._thread.ask, lambda engine: engine.hold(number, adapter))
        except AxiconError as error:
            raise bad_request(self._plain(error), code="unsupported") from None
        named = Named(
            name, number, path, adapter.digest, adapter.rank, int(time.time()), adapter.base is not None,
            step, run,
        )  # fmt: skip
        self.loaded[name] = named
        return named

    async def _give_up(self, name: str) -> None:
        named = self.loaded.pop(name)
        await asyncio.to_thread(self._thread.ask, lambda engine: engine.give_up(named.number))

    @property
    def _file(self) -> Path:
        """One for each base, as servers of several may share a folder."""
        return self._folder() / f".served-{self._base[:16]}.json"

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _recall(self) -> dict[str, tuple[str, str, bool]]:
        """Path, identity, and whether it follows a run, of each name in the file."""
        try:
            content: Any = json.loads(self._file.read_text())
            return {
                str(name): (str(one["path"]), str(one["sha256"]), one.get("follow") is True)
                for name, one in content.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read, no adapters are taken from it: %s", self._file, error)
            return {}

    def _remember(self) -> None:
        from axicon.model.artefact import write_atomically

        content: Mapping[str, Any] = {
            one.name: {"path": one.path, "sha256": one.identity, "follow": one.followed is not None}
            for one in self.loaded.values()
        }
        try:
            write_atomically(self._file, json.dumps(content, indent=1))
        except OSError as error:
            log.warning("%s: %s; a replica that starts again will not know it", self._file, error)
        self._seen = self._stamp()
