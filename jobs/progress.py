"""Progress of a job: a bar on a terminal, whole lines anywhere else (a log file, `ray job submit`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int, int, str], None]
"""Called with what is done, what there is to do, and what can be said so far."""

LINE_SECONDS = 10.0


class Left(TimeRemainingColumn):
    """What is left, with the word for it; nothing while the total is not known."""

    def render(self, task: Task) -> Text:
        return Text.assemble("left ", super().render(task)) if task.total else Text()


class Reporter:
    """Tells on `stream` (standard error if none is given) how far a job is.

    The stream is taken when the reporter is made, so it keeps speaking while others' output is redirected.
    """

    def __init__(self, stream: TextIO | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self.stream = stream or sys.stderr
        self.console = Console(file=self.stream)
        self.line_seconds = line_seconds

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def figures(self, step: int, metrics: Mapping[str, float]) -> None:
        """What a run has come to at a step, by the names its report has at the end. Nobody listens here; a
        sweep draws curves of it and ends bad runs by it, by an exception that is no Exception.
        """

    @contextmanager
    def track(self, what: str) -> Iterator[Advance]:
        """`with reporter.track("perplexity") as advance: ... advance(done, total, "20.91")`."""
        if self.console.is_terminal:
            with self._bar(what) as advance:
                yield advance
        else:
            yield self._lines(what)

    @contextmanager
    def _bar(self, what: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Left(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=None, note="")

            def advance(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield advance

    def _lines(self, what: str) -> Advance:
        """A line at the end, and on the way one every `line_seconds`."""
        start = last = time.monotonic()

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if done < total and now - last < self.line_seconds:
                return
            last = now
            said = f", {note}" if note else ""
            self.say(f"{what} {done}/{total}{said}, {now - start:.0f} s")

        return advance
