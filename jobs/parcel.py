"""What a job takes along: which files of a working directory Ray would send, and whether they may be sent.

The rules are Ray's own: its default excludes, .gitignore and .rayignore. Found out before anything is sent,
because Ray packs first and is refused afterwards, without a word about what was too much.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from axicon.errors import AxiconError
from jobs import shown, upload

LIMIT_BYTES = 100 * 2**20
"""What the dashboard takes in one request; more is an HTTP 413 (measured)."""
ENTRY_BYTES = 150
"""Two headers of a file in the archive, beside its name in both."""
SHOWN = 5
quiet = logging.getLogger("axicon.parcel")
quiet.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A working directory as Ray would send it."""

    folder: Path
    files: tuple[tuple[int, Path], ...]
    """(bytes, path inside the folder), largest first."""
    digest: str = ""
    """Ray's own of the content: equal code, equal digest."""

    @property
    def bytes(self) -> int:
        """Of the archive, which Ray does not compress, seen on the large side."""
        return sum(size + ENTRY_BYTES + 2 * len(str(path)) for size, path in self.files)


def look(folder: Path, limit: int = LIMIT_BYTES) -> Parcel:
    """What of `folder` would be sent. Raises AxiconError when it is not there or over the limit."""
    if not folder.is_dir():
        raise AxiconError(f"--working-dir {folder}: no such directory; name one with the job's code")
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    excludes = ray_constants.get_runtime_env_default_excludes()
    obey_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    found: list[tuple[int, Path]] = []
    folder = folder.absolute()

    def note(path: Path) -> None:
        if path.is_file():
            found.append((path.stat().st_size, path.relative_to(folder)))

    matchers = [packaging._get_excludes(folder, excludes)]
    packaging._dir_travel(folder, matchers, note, include_gitignore=obey_gitignore, logger=quiet)
    parcel = Parcel(folder, tuple(sorted(found, key=lambda one: (-one[0], one[1]))))
    if parcel.bytes > limit:
        largest = ", ".join(f"{path} ({shown.size(size)})" for size, path in parcel.files[:SHOWN])
        raise AxiconError(
            f"--working-dir {folder}: {shown.size(parcel.bytes)} would be sent, and a cluster takes "
            f"{shown.size(limit)}; largest are {largest}; name what a job does not need in "
            f"{folder / '.rayignore'}, a pattern a line, and put weights and data where every node reads them"
        )
    uri = packaging.get_uri_for_directory(str(folder), obey_gitignore, excludes)
    return Parcel(folder, parcel.files, uri.rpartition("_")[2].removesuffix(".zip"))


@contextlib.contextmanager
def standing_still(parcel: Parcel) -> Iterator[Parcel]:
    """A copy of what would be sent, for the time of the block.

    Ray reads a folder twice, for the name of its archive and for the archive: a file that is written to in
    between, such as a log, and the cluster looks for an archive that is not there. Raises AxiconError when
    it cannot be copied.
    """
    with tempfile.TemporaryDirectory(prefix="axicon-") as folder:
        try:
            for _, path in parcel.files:
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # it has just gone
                    shutil.copy(parcel.folder / path, target)
        except OSError as error:
            raise AxiconError(
                f"{parcel.folder}: cannot be copied to {folder} ({error.strerror}); free some space there or "
                "name another place in TMPDIR"
            ) from None
        yield look(Path(folder))


@contextlib.contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder that was chosen, else the checkout this runs from, else a copy of the installed packages."""
    root = Path(__file__).resolve().parent.parent
    if chosen is None and not (root / "pyproject.toml").exists():
        with upload.packages() as folder:
            yield folder
    else:
        yield chosen or root
