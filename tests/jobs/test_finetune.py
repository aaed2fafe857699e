"""`axicon finetune` and `axicon replay` on a tiny model: bit for bit after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from axicon.errors import AxiconError, RunFailed
from axicon.finetune.log import read
from axicon.finetune.updates import UPDATE_RULES
from axicon.model import adapterfile, checkpoint
from axicon.model.artefact import read_manifest
from jobs import finetune, replay
from jobs.__main__ import axicon
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe
from jobs.lineage import run as lineage
from jobs.report import Report
from tests.conftest import ROOT
from tests.services.tiny import tiny_model

AXICON = Path(sysconfig.get_path("scripts")) / "axicon"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model(folder / "model", positions=128)
    records = [{"text": f"number {i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def recipe(place: Path, **changes: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "data": {
            "train": str(place / "data.jsonl"), "evaluate": str(place / "data.jsonl"),
            "template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"}, "evaluate_limit": 8,
        },
        "rule": {"method": "zo_sgd", "lr": 1e-2, "eps": 1e-2}, "scheme": {"method": "lora", "r": 2},
        "steps": 6, "batch": 4, "evaluate_every": 3, "threads": 1, "keep": "last",
    }  # fmt: skip
    data = values["data"] | changes.pop("data", {})
    return FinetuneRecipe.parse(**(values | changes | {"data": data}))


def digest(report: Report) -> str:
    return str(report.details["digest"])


def test_a_run_from_its_data_to_a_model_that_is_served(place: Path, tmp_path: Path) -> None:
    report = finetune.run(recipe(place, out=tmp_path / "run"))
    assert [one["step"] for one in report.details["evaluations"]] == [0, 3, 6]
    assert {"accuracy_before", "accuracy_after", "loss_before", "loss_after"} <= report.metrics.keys()
    result = report.files[0]
    model = checkpoint.load(result, dtype=torch.float32)
    base = checkpoint.load(place / "model", dtype=torch.float32)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed == {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}
    manifest = read_manifest(result) or {}
    assert manifest["chain"][-1]["method"] == "finetune"
    assert manifest["chain"][-1]["settings"]["rule.lr"] == 1e-2
    found = lineage(str(result))
    assert found.chain == (
        f"finetune data={manifest['chain'][-1]['settings']['data'][:12]} rule=zo_sgd "
        "rule.lr=0.01 scheme=lora scheme.r=2 steps=6",
    )
    [parent] = found.parents
    assert parent.state == "here"
    page = (tmp_path / "run" / "curves.html").read_text()
    drawn = json.loads(page.partition('id="document">')[2].partition("</script>")[0])
    assert [step for step, _ in drawn["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [one["accuracy"] for one in drawn["evaluations"]] == [
        one["accuracy"] for one in report.details["evaluations"]
    ]
    assert drawn["result_step"] == report.details["result_step"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_stopping_anywhere_changes_no_bit(place: Path, tmp_path: Path) -> None:
    whole = finetune.run(recipe(place, out=tmp_path / "whole"))
    again = finetune.run(recipe(place, out=tmp_path / "whole"))
    finetune.run(recipe(place, out=tmp_path / "parts", steps=2))
    log = tmp_path / "parts" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step":2,"loss":3.1')  # killed while it wrote
    parts = finetune.run(recipe(place, out=tmp_path / "parts"))
    assert digest(parts) == digest(whole) == digest(again)
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    replayed = replay.run(tmp_path / "whole", ReplayRecipe(step=2, out=tmp_path / "at-2"))
    two = finetune.run(recipe(place, out=tmp_path / "two", steps=2))
    assert replayed.digest == digest(two) != digest(whole)
    weights = [checkpoint.load(f) for f in (tmp_path / "at-2", two.files[0])]
    assert all(torch.equal(p, weights[1].get_parameter(n)) for n, p in weights[0].named_parameters())


def test_evaluations_that_a_kill_took_are_made_up_for(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, out=tmp_path / "run")
    want = finetune.run(asked)
    kept = tmp_path / "run" / "evaluations.json"
    content = json.loads(kept.read_text())
    content["found"].pop()
    kept.write_text(json.dumps(content))
    assert finetune.run(asked).details["evaluations"] == want.details["evaluations"]
    others = finetune.run(
        asked.model_copy(update={"data": asked.data.model_copy(update={"evaluate_limit": 4})})
    )
    assert {one["examples"] for one in others.details["evaluations"]} == {4}
    fewer = finetune.run(asked.model_copy(update={"steps": 3}))
    assert [one["step"] for one in fewer.details["evaluations"]] == [3]


def test_killed_and_run_again(place: Path, tmp_path: Path) -> None:
    want = finetune.run(recipe(place, out=tmp_path / "want", steps=12))
    asked = recipe(place, out=tmp_path / "killed", steps=12)
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.as_yaml())
    log = tmp_path / "killed" / "log.jsonl"
    words = [AXICON, "finetune", str(file)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(log)[1] != []
    assert digest(finetune.run(asked)) == digest(want)


def test_virtual_shards_belong_to_the_run(place: Path, tmp_path: Path) -> None:
    one = finetune.run(recipe(place, out=tmp_path / "one"))
    two = finetune.run(recipe(place, out=tmp_path / "two", shards=2))
    first, second = (read(tmp_path / name / "log.jsonl")[1][0] for name in ("one", "two"))
    assert first is not None
    assert second is not None
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert digest(one) != digest(two)  # the last bits of sums


def test_the_best_step_is_kept_where_it_is_not_the_last(place: Path, tmp_path: Path) -> None:
    """Steps so large that they can only do harm, judged by loss alone."""
    ruin = {"method": "zo_sgd", "lr": 50.0, "eps": 1e-2}
    text = {"form": "text", "column": "text", "template": None, "verbalizer": None, "max_tokens": 16}
    report = finetune.run(recipe(place, out=tmp_path / "run", rule=ruin, keep="best", data=text))
    assert report.details["result_step"] == 0
    assert "accuracy_after" not in report.metrics
    base = checkpoint.load(place / "model", dtype=torch.float32)
    model = checkpoint.load(report.files[0], dtype=torch.float32)
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters())


def test_an_adapter_on_packed_weights_that_stay_packed(place: Path, tmp_path: Path) -> None:
    report = finetune.run(recipe(place, out=tmp_path / "run", compressor="group_int4", steps=2))
    assert (read_manifest(report.files[0]) or {})["kind"] == "adapter"
    config = json.loads((report.files[0] / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    with pytest.raises(AxiconError, match="would be rounded again"):
        finetune.run(recipe(place, out=tmp_path / "other", compressor="group_int4", steps=1, output="merged"))


def test_what_steps_take_is_told_and_kept(place: Path, tmp_path: Path) -> None:
    torch.ones(100_000_000)  # what was here before does not count
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = finetune.run(recipe(place, out=tmp_path / "run"))
    cost = {name: report.metrics[name] for name in ("step_seconds", "peak_bytes")}
    assert 0 < cost["step_seconds"] < report.seconds
    assert 100e6 < cost["peak_bytes"] < most - 200e6
    assert any(" s a step, at most " in line for line in finetune.summary(report))
    again = finetune.run(recipe(place, out=tmp_path / "run"))  # which takes no step
    assert {name: again.metrics[name] for name in cost} == cost


def test_an_adapter_is_served_and_evaluated_beside_its_base(place: Path, tmp_path: Path) -> None:
    """As the merged model of the same run, and on the base it was trained on alone."""
    made = {
        output: finetune.run(recipe(place, out=tmp_path / output, output=output, steps=3)).files[0]
        for output in ("adapter", "merged")
    }
    where = adapterfile.locate(made["adapter"])
    model = checkpoint.load(where.base, dtype=torch.float32)
    adapterfile.install(model, adapterfile.read_adapter(made["adapter"], model.shape))
    tokens = torch.arange(20)[None]
    merged, base = (checkpoint.load(one, dtype=torch.float32) for one in (made["merged"], where.base))
    with torch.no_grad():
        states = [one.states(tokens) for one in (model, merged, base)]
    assert torch.allclose(states[0], states[1], atol=1e-4)
    assert not torch.allclose(states[0], states[2], atol=1e-3)
    found = CliRunner().invoke(axicon, ["verify", str(made["adapter"])])
    assert "is intact: an adapter beside its base" in " ".join(found.output.split())
    moved = tmp_path / "moved"
    shutil.copytree(place / "model", moved)
    config = json.loads((made["adapter"] / "adapter_config.json").read_text())
    (made["adapter"] / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(moved)})
    )
    with pytest.raises(AxiconError, match=r"other sha256|bytes, the manifest"):
        adapterfile.read_adapter(made["adapter"], model.shape)
    content = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(content | {"rope_theta": 1e5}))
    with pytest.raises(AxiconError, match="an adapter fits its own base alone"):
        adapterfile.locate(made["adapter"])


def test_one_shipped_sweep_has_every_rule_of_the_benchmark() -> None:
    content = yaml.safe_load((ROOT / "recipes" / "sweep_finetune.yaml").read_text())
    asked = content["space"]["rule"]
    assert {one["method"] for one in asked} == UPDATE_RULES.keys() - {"zo2"}
    assert content["base"]["steps"] == 500
    for one in asked:
        FinetuneRecipe.parse(**(content["base"] | {"rule": one})).rule.build(UPDATE_RULES, "rule")


def test_forward_mode_stops_at_packed_products(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="no derivative of products stored as group_int"):
        finetune.run(recipe(place, out=tmp_path / "run", compressor="group_int4", rule="forward_grad"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": {"method": "zo_sgd", "lr": 2e-2}}, "run: rule.lr is 0.01 there and 0.02 here; give"),
        (
            {"rule": {"method": "zo_sgd", "lr": 1e-2, "resample": 2}},
            "rule.resample is 1 there and 2 here; give",
        ),
        ({"rule": "adamw"}, "rule.name is ZoSGD there and AdamW here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"scheme": {"method": "lora", "r": 3}}, "scheme.r is 2 there and 3 here"),
        ({"data": {"limit": 39}}, r"data is [0-9a-f]{12}\.\.\. there and [0-9a-f]{12}\.\.\. here; give"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    finetune.run(recipe(place, out=tmp_path / "run", steps=1))
    names = ("log.jsonl", "recipe.yaml", "run.json", "result/model.safetensors")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    with pytest.raises(AxiconError, match=said):
        finetune.run(recipe(place, out=tmp_path / "run", **changes))
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


def test_a_disk_that_is_full_elsewhere_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote: list[object] = []

    def full(path: Path, text: str) -> None:
        if wrote:
            raise OSError(28, "No space left on device")
        wrote.append(path.write_text(text))

    monkeypatch.setattr("jobs.finetune_work.write_atomically", full)
    with pytest.raises(AxiconError, match="No space left on device; 3 steps are kept"):
        finetune.run(recipe(place, out=tmp_path / "run", evaluate_every=3))


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    finetune.run(recipe(place, out=tmp_path / "run", steps=1))
    other = tiny_model(tmp_path / "other", positions=256)
    with pytest.raises(AxiconError, match="base is"):
        finetune.run(recipe(place, out=tmp_path / "run", model=str(other)))
    with pytest.raises(AxiconError, match="begins from a base with digest"):
        replay.run(tmp_path / "run", ReplayRecipe(model=str(other)))


def test_a_step_the_log_has_not(place: Path, tmp_path: Path) -> None:
    finetune.run(recipe(place, out=tmp_path / "run", steps=1))
    with pytest.raises(AxiconError, match="steps 0 to 1"):
        replay.run(tmp_path / "run", ReplayRecipe(step=2))
    with pytest.raises(AxiconError, match="no run of axicon finetune"):
        replay.run(tmp_path, ReplayRecipe())


def test_losses_that_are_not_finite_are_skipped_and_then_stop(place: Path, tmp_path: Path) -> None:
    asked = recipe(
        place,
        out=tmp_path / "run",
        rule={"method": "zo_sgd", "lr": 1e38, "eps": 1e-2},
        steps=60,
        data={"evaluate": None},
    )
    with pytest.raises(RunFailed, match="no finite loss in 20 steps"):
        finetune.run(asked)
    _, steps, _ = read(tmp_path / "run" / "log.jsonl")
    assert steps[-20:] == [None] * 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "zo_sdg"}, "known are .*zo_sgd"),
        ({"rule": {"method": "zo_sgd", "epsilon": 1}}, "did you mean 'eps'"),
        ({"rule": {"method": "zo_sgd", "eps": 0}}, "eps must be more than 0"),
        ({"scheme": {"method": "lora", "targets": ["q", "x"]}}, "targets are some of"),
        ({"scheme": {"method": "lora", "targets": ["gate"], "r": 0}}, "r and alpha"),
        ({"scheme": "full", "compressor": "group_int4"}, "stored as group_int"),
        ({"batch": 4, "shards": 3}, "does not divide"),
        ({"compressor": "gptq"}, "looks at data"),
        ({"data": {"max_tokens": 500}}, "the model knows 128"),
        ({"data": {"train": None, "template": None, "verbalizer": None}}, "nothing to train on"),
        ({"data": {"verbalizer": {"0": "no", "2": "yes"}}}, "line 2: label 1 is not in the verbalizer"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AxiconError, match=said):
        finetune.run(recipe(place, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_full_disk_loses_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = finetune.run(recipe(place, out=tmp_path / "want"))
    wrote = 0

    def full(descriptor: int, content: bytes) -> None:
        nonlocal wrote
        wrote += 1
        if wrote == 4:
            os.write(descriptor, content[:7])
            raise OSError(28, "No space left on device")
        os.write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr("axicon.finetune.log.write_all", full)
        with pytest.raises(AxiconError, match="2 steps are kept, free some"):
            finetune.run(recipe(place, out=tmp_path / "run"))
    assert digest(finetune.run(recipe(place, out=tmp_path / "run"))) == digest(want)


def test_the_commands_say_what_came_of_it(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(place, out=tmp_path / "run", steps=2).as_yaml())
    done = CliRunner().invoke(axicon, ["finetune", str(file)])
    assert done.exit_code == 0, done.output
    assert "axicon serve" in done.output
    again = CliRunner().invoke(axicon, ["replay", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again.output == f"step 2, digest {found['digest']}\n"


@pytest.mark.ray
def test_any_number_of_workers_writes_the_same_log(place: Path, tmp_path: Path) -> None:
    want = finetune.run(recipe(place, out=tmp_path / "alone", shards=4))
    asked = recipe(place, out=tmp_path / "workers", shards=4, workers=2, steps=3)
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.as_yaml())
    done = subprocess.run(
        [AXICON, "finetune", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    finetune.run(asked.model_copy(update={"workers": 0, "steps": 6}))  # another number goes on with it
    log = (tmp_path / "workers" / "log.jsonl").read_bytes()
    assert log == (tmp_path / "alone" / "log.jsonl").read_bytes()
    assert json.loads((tmp_path / "workers" / "run.json").read_text())["digest"] == digest(want)
