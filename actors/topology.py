"""From a plan to a placement group."""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from axicon.errors import AxiconError
from axicon.place import Plan


def reserve(plan: Plan, cpus: int, timeout_s: float) -> PlacementGroup:
    """One bundle for every stage but the first, which is computed by the caller's process.

    Raises AxiconError when the cluster has no room for them within the time-out.
    """
    bundles = [{"CPU": float(cpus)} for _ in plan.stages[1:]]
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_s):
        remove_placement_group(group)
        free = ray.available_resources().get("CPU", 0)
        raise AxiconError(
            f"the shards need {len(bundles)} x {cpus} CPU, after {timeout_s:g} s the cluster had {free:g} "
            "free; add nodes, stop what runs there, or ask for fewer stages"
        )
    return group
