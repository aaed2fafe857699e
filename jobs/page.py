"""Pages in one file: a template of `jobs/pages` with its style, its scripts and the document they draw.

Opened as a file such a page needs nothing else. Its own policy lets only the scripts run that are named in it
by their digest, so text of a document stays text even if a script handled it wrongly.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.report import plain

PAGES = Path(__file__).parent / "pages"

STYLE = re.compile(r'<link rel="stylesheet" href="(?:[^"]*/)?([\w-]+\.css)">')
SCRIPT = re.compile(r'<script src="(?:[^"]*/)?([\w-]+\.js)"></script>')
ICON = re.compile(r'<link rel="icon"[^>]*>')
DOCUMENT = '<script type="application/json" id="document">null</script>'
HEAD = '<meta charset="utf-8">'


def one_file(template: str, document: Mapping[str, Any]) -> str:
    """The page `template` (a name in `jobs/pages`) with everything it links and `document` inside.

    Numbers that are not finite become null: JSON has none.
    """
    styles: list[str] = []
    scripts: list[str] = []
    page = (PAGES / template).read_text(encoding="utf-8")
    page = STYLE.sub(lambda found: f"<style>{_kept(found[1], styles)}</style>", page)
    page = SCRIPT.sub(lambda found: f"<script>{_kept(found[1], scripts)}</script>", page)
    policy = (
        f"default-src 'none'; style-src {_digests(styles)}; script-src {_digests(scripts)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    # An empty icon: without one a browser asks the server for /favicon.ico.
    page = ICON.sub('<link rel="icon" href="data:,">', page)
    page = page.replace(HEAD, f'{HEAD}\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    return page.replace(DOCUMENT, DOCUMENT.replace("null", embedded(document)), 1)


def embedded(document: Mapping[str, Any]) -> str:
    """Strict JSON in which nothing can end or open an element, whatever texts it holds."""
    text = json.dumps(plain(document), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _kept(name: str, found: list[str]) -> str:
    found.append((PAGES / name).read_text(encoding="utf-8"))
    return found[-1]


def _digests(texts: list[str]) -> str:
    found = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in found)
