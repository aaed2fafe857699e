"""`axicon submit` on the cluster of this session: the same results as here, and what stopping one leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import AXICON, TestCluster
from tests.conftest import ROOT
from tests.evaluate.tiny import PROSE, make_tokenizer, save_model

pytestmark = pytest.mark.ray

VARIES = ("date", "total_evaluation_time_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text of some windows and a task of some thousand questions."""
    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "tiny", make_tokenizer())
    (folder / "text.txt").write_text(PROSE * 8)
    (folder / "sst2").mkdir()
    records = [{"sentence": f"film {n} was {n * n} times a film .", "label": n % 2} for n in range(2000)]
    (folder / "sst2" / "dev.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return ["evaluate", str(folder / "tiny"), f"text={folder / 'text.txt'}", "window=32", "threads=1", *more]


def results(out: Path) -> dict[str, Any]:
    """The results file of a run, without what differs between two runs of the same."""
    [path] = (out / "tiny").glob("results_*.json")
    content = json.loads(path.read_text())
    assert content["axicon"]["recipe"].pop("out") == str(out)
    return {key: value for key, value in content.items() if key not in VARIES}


def test_a_verb_gives_the_same_results_however_it_is_run(cluster: TestCluster, folder: Path) -> None:
    module = [sys.executable, "-m", "jobs", *words(folder, f"out={folder / 'module'}")]
    with subprocess.Popen(module, cwd=ROOT, env=cluster.env, stderr=subprocess.DEVNULL) as beside:
        cluster.axicon(*words(folder, f"out={folder / 'verb'}"))
    assert beside.returncode == 0
    job = cluster.axicon("submit", "--cluster", cluster.name, *words(folder, f"out={folder / 'job'}"))
    assert results(folder / "verb") == results(folder / "module") == results(folder / "job")
    said = job.stdout.splitlines()
    assert said[-1].startswith("evaluate-tiny-")
    assert " succeeded after " in said[-1]
    assert said[-2].startswith("evaluate finished after ")
    [first] = [line for line in said if line.startswith("axicon evaluate, job evaluate-tiny-")]
    assert "threads=1" in first
    assert "(cpu)" in first, "not on the head, which has no CPU for jobs"
    log = read_log(cluster, said[-1].split()[0])
    assert [mark for mark in ("\r", "\x1b", "it/s") if mark in log] == []


def read_log(cluster: TestCluster, name: str) -> str:
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/{name}/logs", headers=cluster.headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["logs"])


def test_a_stopped_job_is_no_success_and_goes_on_when_it_is_submitted_again(
    cluster: TestCluster, folder: Path, tmp_path: Path
) -> None:
    submit = ["submit", "--cluster", cluster.name, "--id", "stopped", "--working-dir", str(tmp_path)]
    asked = [*submit, *words(folder, "tasks=sst2", f"data={folder}", f"out={folder / 'out'}")]
    with subprocess.Popen(
        [str(AXICON), *asked],
        cwd=ROOT,
        env=cluster.env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        said = []
        for line in first.stdout:
            said.append(line)
            if line.startswith("perplexity "):
                break
        stop = urllib.request.Request(
            f"{cluster.dashboard}/api/jobs/stopped/stop", method="POST", headers=cluster.headers
        )
        urllib.request.urlopen(stop, timeout=30).close()
        rest, error = first.communicate(timeout=60)
    assert first.returncode == 1, "".join(said) + rest
    assert "stopped was stopped, and stopped is not a success" in error
    assert "rerun the same command to continue" in rest
    [kept] = (folder / "out" / "tiny").iterdir()
    assert kept.name.startswith("unfinished_")

    again = cluster.axicon(*asked)
    assert "stopped-2 succeeded" in again.stdout
    assert f"going on from {kept}" in again.stdout
    assert not kept.exists()
    assert results(folder / "out")["results"]["sst2"]["sample_len"] == 2000
    assert cluster.axicon(*asked).stdout == "stopped-2 has succeeded already; --again runs it once more\n"
    listed = cluster.axicon("submit", "--cluster", cluster.name, "--list").stdout.splitlines()
    ends = [line.split()[:2] for line in listed if line.startswith("stopped")]
    assert ends == [["stopped", "STOPPED"], ["stopped-2", "SUCCEEDED"]]
    assert len({line.index("python -m jobs") for line in listed if "python -m jobs" in line}) == 1
