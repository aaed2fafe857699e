"""A sweep as a job of a cluster: trials in actors of Tune, ended early by their steps."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from jobs import sweep
from jobs.progress import Reporter
from tests.cluster import TestCluster
from tests.jobs.test_sweep_population import finetuning
from tests.jobs.toy import one_by_one
from tests.services.tiny import tiny_model

pytestmark = pytest.mark.ray


def test_a_sweep_of_finetunings_as_a_job_ends_bad_trials_early(cluster: TestCluster, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", positions=128)
    records = [{"text": f"number {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    content = {
        "verb": "finetune",
        "base": {
            "model": str(tmp_path / "model"),
            "data": {
                "train": str(tmp_path / "data.jsonl"), "evaluate": str(tmp_path / "data.jsonl"),
                "template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"},
            },
            "rule": {"method": "adamw"}, "steps": 6, "batch": 8, "evaluate_every": 2,
        },
        "space": {"rule.lr": [0.01, 1e-9, 1e-8, "fast"]},
        "search": "grid", "scheduler": "asha", "reduction": 2, "at_once": 1, "out": str(tmp_path / "sweep"),
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    done = cluster.axicon(
        "submit", "--cluster", cluster.name, "sweep", str(tmp_path / "sweep.yaml"), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    trials = {one["trial"]: one for one in document["trials"]}
    assert [one["status"] for one in trials.values()] == ["finished", "stopped", "stopped", "failed"]
    assert (document["status"], document["best"]) == ("finished", "0001")
    assert [one["step"] for one in trials["0001"]["steps"]] == [2, 4, 6]
    assert trials["0001"]["metrics"]["loss_after"] < trials["0002"]["metrics"]["loss_after"]
    assert trials["0002"]["reason"] == "ended early by asha after step 2"
    assert trials["0004"]["reason"].startswith("rule.lr=fast: must be a valid number")
    assert trials["0001"]["serve"] == f"axicon serve {tmp_path / 'sweep' / 'trials' / '0001' / 'result'}"
    said = done.stdout.splitlines()
    assert len([line for line in said if line[:4] in trials]) == 4
    assert not [line for line in said if "\r" in line or "\x1b" in line]


def kill_a_trial(cluster: TestCluster, ledger: Path) -> None:
    """Kill the process of a trial of the second generation as soon as there is one."""
    state = Path(cluster.env["AXICON_STATE"]) / "clusters" / f"{cluster.name}.json"
    holder = json.loads(state.read_text())["pid"]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        begun = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        if any(one.get("trial") == "0003" for one in begun):
            for process in psutil.Process(holder).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith("ray::ImplicitFunc.train"):
                        process.kill()
                        return
        time.sleep(0.02)
    raise AssertionError("no trial of the second generation ran")


def test_a_population_in_actors_at_the_same_time_is_the_one_of_this_process(
    cluster: TestCluster, tmp_path: Path
) -> None:
    """Though the process of a trial is killed on the way."""
    asked = finetuning(tmp_path, tmp_path / "here", {"method": "zo_sgd"})
    want = sweep.run(asked, Reporter(io.StringIO()), one_by_one).details
    there = asked.model_copy(update={"out": tmp_path / "there", "at_once": 2})
    (tmp_path / "sweep.yaml").write_text(there.as_yaml())
    killing = threading.Thread(target=kill_a_trial, args=(cluster, tmp_path / "there" / "ledger.jsonl"))
    killing.start()
    said = cluster.axicon("submit", "--cluster", cluster.name, "sweep", str(tmp_path / "sweep.yaml")).stdout
    killing.join()
    assert said.count("has lost its process and begins again") == 1
    found = json.loads((tmp_path / "there" / "sweep.json").read_text())
    assert found["best"] == want["best"]
    for one, other in zip(found["trials"], want["trials"], strict=True):
        same = ("trial", "status", "parent", "settings", "recipe_sha256")
        assert [one[key] for key in same] == [other[key] for key in same]
        assert one["metrics"]["loss_after"] == other["metrics"]["loss_after"]
