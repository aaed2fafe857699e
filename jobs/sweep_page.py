"""`sweep.html`: the document of a sweep as a page to read it.

The page draws in the browser, so it can sort, filter and choose axes without anybody's help: opened as a file
it shows the document inside it, and over HTTP it reads `sweep.json` beside it again every few seconds. Its
parts are in `jobs/pages`; `trials.js` has the front and the importance of settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.page import one_file

TEMPLATE = "sweep.html"


def render(document: Mapping[str, Any]) -> str:
    """The whole page for a document as `jobs/sweep_document.py` makes it."""
    return one_file(TEMPLATE, document)
