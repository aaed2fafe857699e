"""`axicon distill` as a job of a cluster: experts as tasks, and the bytes of a run that is none."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from jobs import distill
from jobs.distill_recipe import DistillRecipe
from jobs.progress import Reporter
from tests.cluster import TestCluster

pytestmark = pytest.mark.ray
pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra `distill`")


def test_experts_as_tasks_of_the_cluster_give_the_same_bytes(cluster: TestCluster, tmp_path: Path) -> None:
    records = [{"image": [[i % 3 * 90, 40], [10, i * 5]], "label": i % 3} for i in range(30)]
    source = tmp_path / "images.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in records))
    asked = DistillRecipe.parse(
        data={"source": str(source)},
        network={"method": "mlp", "width": 4},
        experts={"count": 2, "epochs": 3},
        judge={"nets": 1, "epochs": 5, "baselines": False},
        iterations=2,
        lr_data=1.0,
        lr_alpha=0.0,
        steps=2,
        max_start=2,
        workers=2,
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.as_yaml())
    job = cluster.axicon("submit", "--cluster", cluster.name, "distill", str(file), f"out={tmp_path / 'job'}")
    assert "experts, epochs 6/6" in job.stdout
    alone = asked.model_copy(update={"workers": 0, "out": tmp_path / "alone"})
    report = distill.run(alone, Reporter(io.StringIO()))
    found = json.loads((tmp_path / "job" / "run.json").read_text())
    assert found["digest"] == report.details["digest"]
    ours, theirs = (
        sorted(path.read_bytes() for path in (tmp_path / name).rglob("trajectory.safetensors"))
        for name in ("alone", "job")
    )
    assert ours == theirs
    assert len(ours) == 2
