"""ShardGroup: a model in stages gives what it gives in one process; and what is said when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster import AXICON, ROOT, TestCluster
from tests.parity import variants

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `under_ray.py` found, as a job of the session's cluster."""
    folder = tmp_path_factory.mktemp("models")
    for name, variant in {"llama": "llama_grouped", "opt": "opt"}.items():
        variants.saved(variant, folder / name)
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    submit = [str(AXICON.with_name("ray")), "job", "submit", "--runtime-env-json", runtime_env, "--"]
    run = subprocess.run(
        [*submit, sys.executable, "-m", "tests.actors.under_ray", str(folder)],
        cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize(
    ("name", "plan"), [("llama", "2x1: 0-1, 2-2"), ("opt", "3x1: 0-0, 1-1, 2-2")]
)
def test_text_of_concurrent_requests_equals_the_local_runner(
    found: dict[str, Any], name: str, plan: str
) -> None:
    case = found[name]
    assert case["texts"] == case["local_texts"]
    assert case["again"] == case["texts"]
    finishes = {request: finish for request, (_, finish) in case["texts"].items()}
    assert finishes.pop("gone") == "cancelled"
    assert set(finishes.values()) == {"length"}
    assert [len(text) for request, (text, _) in case["texts"].items() if request != "gone"] == [20] * 4
    assert case["tree"], "logits of a tree differ from the local runner's"
    # Equal text, but another deployment: nobody promises the same bits across plans.
    assert case["plan"] == plan
    assert case["fingerprints_differ"]
    assert len(set(case["bytes_per_slot"])) == 1
    assert case["bad_step"] == "ValueError: nodes 0..0: request row 3 is not open"


@pytest.mark.parametrize("name", ["llama", "opt", "silent", "refused"])
def test_nothing_is_left(found: dict[str, Any], name: str) -> None:
    assert found[name].get("gone", True), "a shard's process still runs"
    assert found[name]["placed"] == 0


def test_a_closed_group_says_so(found: dict[str, Any]) -> None:
    assert found["llama"]["closed"] == "RunFailed: the model was closed"


def test_a_step_that_fails_is_told_and_the_group_goes_on(found: dict[str, Any]) -> None:
    case = found["llama"]["failures"]
    assert case["shard"] == (
        "RunFailed: shard 1 (blocks 2-2) failed to compute a step: MemoryError: no more extents"
    )
    assert case["commit"].startswith("ValueError: commits (0,)"), "rank 0 still holds its nodes"
    assert case["own"] == "ValueError: broken on purpose"
    assert case["equal"]


def test_a_killed_shard_is_told_at_once(found: dict[str, Any]) -> None:
    case = found["opt"]
    assert case["first"] == case["second"]
    assert case["first"] == (
        "RunFailed: shard 2 (blocks 2-2): its process has ended; the model is lost, start it again"
    )
    assert case["seconds"] < 5


def test_a_shard_that_does_not_answer_is_told_within_the_time_out(found: dict[str, Any]) -> None:
    case = found["silent"]
    assert case["after"] == 4, "the group did not survive a pause longer than its time-out"
    assert case["first"] == case["second"]
    assert case["first"] == (
        "RunFailed: shard 1 (blocks 2-2): it does not answer; the model is lost, start it again"
    )
    assert 1.9 < case["seconds"] < 8


def test_what_cannot_start_is_one_line(found: dict[str, Any]) -> None:
    refused = found["refused"]
    # Of the cluster's 16, servers of other tests may have some.
    assert refused["room"].startswith(
        f"AxiconError: the shards need 1 x 64 CPU, after 1 s the cluster had {refused['free']} free"
    )
    assert 8 < refused["free"] <= 16
    assert refused["stages"].startswith("AxiconError: 4 stages for a model of 3 blocks")
    assert refused["plan"].startswith("ValueError: plan 2x1: 0-0, 1-1: not the model's 3 blocks")
    assert refused["cache"].startswith("AxiconError: shard 1 (blocks 1-2): the KV cache may take 0 MiB")
    assert "shard 1 (blocks 2-2) has axicon 0.1.0, this process 0.0.0; install the same" in refused["version"]
    assert "this process another; install the same versions and the same model" in refused["digest"]
