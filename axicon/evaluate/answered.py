"""What a model has already answered in an evaluation, on disk, so that a stopped one goes on where it was.

A question is known by the digest of all that was put to the model in one pass, so an answer is only taken up
for the very same pass, and the figures of a run that was stopped are those of one that was not, bit for bit.
`identity` says whose answers they are: another model, thread count or version begins anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.model.artefact import write_atomically

FORMAT_VERSION = 1
WRITE_S = 10.0
"""How much work a killed process may lose. One that is stopped loses nothing."""


class Answered:
    """Answers by question, in `path`. Without a path they are remembered for this process only."""

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._identity = dict(identity or {})
        self._answers: dict[str, Any] = {}
        self._written = time.monotonic()
        if path is not None and path.exists():
            self._answers = self._read(path)
        self.found = len(self._answers)
        """Answers of an earlier run."""

    @property
    def empty(self) -> bool:
        return not self._answers

    @staticmethod
    def key(kind: str, question: Any) -> str:
        """The name of a question, which is plain data."""
        text = json.dumps([kind, question], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The answer as plain data, or None. JSON keeps every bit of a float."""
        return self._answers.get(key)

    def put(self, key: str, answer: Any) -> None:
        self._answers[key] = answer
        if time.monotonic() - self._written >= WRITE_S:
            self.write()

    def write(self) -> None:
        """Everything so far, as one file that is there whole or not at all. Raises AxiconError."""
        if self.path is None or not self._answers:
            return
        content = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "answers": self._answers,
        }
        try:
            write_atomically(self.path, json.dumps(content, ensure_ascii=False))
        except OSError as error:
            raise AxiconError(f"{self.path}: cannot be written ({error.strerror}); make room there") from None
        self._written = time.monotonic()

    def remove(self) -> None:
        """The run is complete, and its results are written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
            version, identity, answers = (content[k] for k in ("format_version", "identity", "answers"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise AxiconError(f"{path}: cannot be read ({reason}); remove it to begin anew") from None
        if version != FORMAT_VERSION:
            raise AxiconError(
                f"{path}: is of format {version}, this axicon reads {FORMAT_VERSION}; remove it to begin anew"
            )
        return dict(answers) if identity == self._identity else {}
