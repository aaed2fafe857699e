"""`GET /v1/capabilities`: what this deployment can do, read from the tables that requests are checked by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axicon.recipe import ServeRecipe
from services import openapi
from services.openapi import Schema
from services.plan import Served
from services.schema import Sampling

if TYPE_CHECKING:
    from axicon.protocols import Needs

PARTS = ("kv", "speculation", "model", "user")
"""Fields of a request that are told elsewhere, or say nothing about what can be done."""


def capabilities(recipe: ServeRecipe, served: Served) -> dict[str, Any]:
    """The answer. `fields` and `sampling` are JSON schemas with this deployment's bounds, those of
    /openapi.json.
    """
    from axicon.generate.drafting import DRAFTERS
    from axicon.generate.eviction import KV_POLICIES
    from axicon.generate.retention import FULL

    schemas: Schema = openapi.describe(recipe, served)["components"]["schemas"]
    shared = schemas["CompletionBody"]["properties"]
    methods = [(name, cls()) for name, cls in DRAFTERS.items() if recipe.draft or not cls.needs_model]
    policies = [{"name": FULL, "reads": "nothing", "once": False, "recent_share": 1.0, "scores": []}]
    policies += [
        {
            "name": name, "reads": _reads(cls.needs), "once": cls.once, "recent_share": cls.recent_share,
            "scores": list(cls.variants),
        }
        for name, cls in KV_POLICIES.items()
    ]  # fmt: skip
    return {
        "model": served.name,
        "max_model_len": served.max_len,
        "weights": {"format": served.format, "kernels": served.kernels},
        "kv": {
            "default": recipe.kv.model_dump(),
            "floor": recipe.kv_floor,
            "fields": schemas["KVBody"]["properties"],
            "policies": policies,
        },
        "speculation": {
            "default": recipe.speculation.model_dump(),
            "draft_model": recipe.draft is not None,
            "most_nodes": recipe.draft_nodes,
            "fields": schemas["SpeculationBody"]["properties"],
            "methods": [
                {
                    "name": name, "needs_draft_model": method.needs_model, "width": method.width,
                    "depth": method.depth,
                }
                for name, method in methods
            ],
        },
        "prefix_cache": {"share": recipe.prefix_cache},
        "adapters": None
        if recipe.adapters.folder is None
        else {"most": recipe.adapters.most, "rank": recipe.adapters.rank, "loaded": sorted(served.adapters)},
        "sampling": {name: shared[name] for name in Sampling.model_fields if name not in PARTS},
        "limits": recipe.limits.model_dump(),
        "refused": [
            {"fields": one.fields, "param": one.param, "message": one.sentence} for one in served.refused
        ],
    }  # fmt: skip


def _reads(needs: Needs) -> str:
    """What a policy looks at of the attention."""
    if isinstance(needs, str):
        return {"none": "nothing", "column_sums": "the attention of all queries"}[needs]
    return "the attention of the last " + ("query" if needs.count == 1 else f"{needs.count} queries")
