"""Policies that keep a request's cache within a budget, by the name requests call them.

`full`, which keeps everything, is no method: such a request has no policy.
"""

from axicon.generate.eviction.h2o import H2O
from axicon.generate.eviction.key_norm import KeyNorm
from axicon.generate.eviction.snapkv import SnapKV
from axicon.generate.eviction.tova import TOVA
from axicon.generate.eviction.window import Window
from axicon.protocols import KVPolicy

KV_POLICIES: dict[str, type[KVPolicy]] = {
    "h2o": H2O,
    "key_norm": KeyNorm,
    "snapkv": SnapKV,
    "tova": TOVA,
    "window": Window,
}

METHODS = sorted(KV_POLICIES)
"""What `RowPolicy.method` counts."""
