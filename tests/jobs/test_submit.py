"""`axicon submit` without a cluster: what is sent, under which name, and how a job is followed to its end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axicon.errors import AxiconError, RunFailed
from jobs import __main__ as command
from jobs import dashboard, follow, parcel, plan, submit
from jobs.stop import Stopped, stop_on_signal

WORDS = ("demo", "text=text.txt", "windows=2")


class FakeJobs:
    """A cluster's jobs: each `get_job_info` of a running one takes the next of its `(status, log)`."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.sent: list[dict[str, Any]] = []
        self.coming: list[tuple[str, str]] = [("RUNNING", "one\n"), ("SUCCEEDED", "one\ntwo\n")]
        self.version = "2.60.0"

    def add(self, name: str, status: str) -> None:
        self.jobs[name] = SimpleNamespace(
            submission_id=name, status=status, message=None, driver_exit_code=None,
            start_time=1000, end_time=4000, entrypoint="exec python -m jobs evaluate",
        )  # fmt: skip

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def submit_job(self, **words: Any) -> None:
        if words["submission_id"] in self.jobs:
            raise RuntimeError(f"Request failed: job {words['submission_id']} already exists")
        folder = Path(words["runtime_env"]["working_dir"])
        files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
        self.sent.append(words | {"folder": folder, "files": files})
        self.add(words["submission_id"], "PENDING")

    def get_job_info(self, name: str) -> Any:
        if self.jobs[name].status not in follow.ENDED:
            self.jobs[name].status, self.log = self.coming.pop(0)
        return self.jobs[name]

    def get_job_logs(self, name: str) -> str:
        return self.log

    def stop_job(self, name: str) -> None:
        self.coming = [("STOPPED", "")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeJobs:
    """A cluster of this machine, and the current folder with a text and a small working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1\n")
    jobs = FakeJobs()

    @contextlib.contextmanager
    def client(found: dashboard.Dashboard) -> Iterator[FakeJobs]:
        yield jobs

    monkeypatch.setattr(submit, "client", client)
    monkeypatch.setattr(dashboard, "find", lambda *_: dashboard.Dashboard("http://127.0.0.1:1", "t", "here"))
    monkeypatch.setattr(submit, "on_this_machine", lambda found: True)
    monkeypatch.setattr(follow, "QUICK_S", 0)
    return jobs


def run(*words: str, verb: str = "evaluate", **how: Any) -> list[str]:
    said: list[str] = []
    chosen = submit.Submission(**{"working_dir": Path("code"), **how})
    submit.run(chosen, command.axicon, verb, words or WORDS, said.append)
    return said


def test_a_job_is_submitted_followed_and_told_of(fake: FakeJobs, tmp_path: Path) -> None:
    said = run()
    [sent] = fake.sent
    assert sent["submission_id"].startswith("evaluate-demo-")
    text = tmp_path / "text.txt"
    assert sent["entrypoint"] == f"exec python -m jobs evaluate demo windows=2 text={text}"
    assert sent["files"] == {"a.py": "a = 1\n"}
    # What is sent is read twice; the folder itself may be written to meanwhile.
    assert sent["folder"] != tmp_path / "code"
    assert not sent["folder"].exists()
    assert int(sent["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    assert sent["entrypoint_num_cpus"] == 1
    assert said[-3:] == ["one", "two", f"{sent['submission_id']} succeeded after 3 s"]


def test_what_has_succeeded_is_not_run_again_unless_it_is_wanted(fake: FakeJobs) -> None:
    first = run()[-1].split()[0]
    assert run() == [f"{first} has succeeded already; --again runs it once more"]
    assert len(fake.sent) == 1
    fake.coming = [("SUCCEEDED", "")]
    assert run(again=True)[-1] == f"{first}-2 succeeded after 3 s"


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_what_has_not_succeeded_is_tried_again_under_the_next_number(fake: FakeJobs, status: str) -> None:
    base = run()[-1].split()[0]
    fake.jobs[base].status = status
    fake.add(f"{base}-2", status)
    fake.coming = [("SUCCEEDED", "")]
    assert run()[-1].startswith(f"{base}-3 succeeded")


def test_what_runs_is_followed(fake: FakeJobs) -> None:
    base = run()[-1].split()[0]
    fake.jobs[base].status = "RUNNING"
    fake.coming = [("SUCCEEDED", "all of it\n")]
    assert run() == [f"{base} runs already; this is its log", "all of it", f"{base} succeeded after 3 s"]
    assert len(fake.sent) == 1


def test_two_who_submit_the_same_at_once_follow_one_job(
    fake: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "list_jobs", list)
    fake.add("mine", "RUNNING")
    assert run(id="mine")[-1] == "mine succeeded after 3 s"
    assert fake.sent == []


def test_a_cluster_that_has_just_started_is_asked_again(
    fake: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, take = ["No available agent to submit job, please try again later."], fake.submit_job

    def not_yet(**words: Any) -> None:
        if answers:
            raise RuntimeError(answers.pop())
        take(**words)

    monkeypatch.setattr(fake, "submit_job", not_yet)
    assert " succeeded" in run()[-1]
    answers.append("Request failed with status code 500: the disk is full")
    with pytest.raises(RunFailed, match=r"did not take the job: .*the disk is full"):
        run(again=True)


def test_the_name_changes_with_all_that_can_change_a_result(fake: FakeJobs, tmp_path: Path) -> None:
    def name(*words: str) -> str:
        todo = plan.make(command.axicon, "evaluate", words, here=True, sent=Path("code"))
        return todo.name(parcel.look(Path("code")).digest)

    first = name(*WORDS)
    assert name("windows=2", "model=demo", f"text={tmp_path}/text.txt") == first, "the order does not matter"
    others = [name(*WORDS, "seed=7")]
    os.utime(tmp_path / "text.txt", (1, 1))
    others.append(name(*WORDS))
    (tmp_path / "code" / "a.py").write_text("a = 2\n")
    others.append(name(*WORDS))
    assert len({first, *others}) == 4


@pytest.mark.parametrize(("verb", "same"), [("evaluate", True), ("card", False)])
def test_what_was_measured_of_a_model_is_another_input_only_to_who_reads_it(
    fake: FakeJobs, tmp_path: Path, verb: str, same: bool
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    measured = ("report.json", "card.json", "README.md")
    for file in ("model.safetensors", "manifest.json", "config.json", *measured):
        (model / file).write_text("{}")

    def name() -> str:
        return plan.make(
            command.axicon, verb, (f"model={model}", "text=text.txt"), here=True, sent=Path("code")
        ).name("")

    first = name()
    for file in measured:
        (model / file).write_text('{"perplexity": 20.0}')
    assert (name() == first) is same
    (model / "config.json").write_text('{"other": 1}')
    assert name() != first


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "demo", "txt=text.txt"), "unknown key 'txt': did you mean 'text'?"),
        (("evaluate", "demo", "windows=0"), "windows=0: must be greater"),
        (("evaluat", "demo"), "no such verb 'evaluat': did you mean 'evaluate'?"),
        (("xyz",), "no such verb 'xyz': `axicon --help` lists them"),
        (("serve", "demo"), "serve cannot be submitted: it holds a cluster of its own"),
        (("evaluate", "none.yaml"), "none.yaml: cannot be read"),
    ],
)
def test_wrong_words_are_one_line_and_nothing_is_sent(
    fake: FakeJobs, words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(AxiconError) as caught:
        run(*words[1:], verb=words[0])
    assert says in str(caught.value)
    assert fake.sent == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "demo", "text=none.txt"), "no such file: none.txt"),
        (("evaluate", "demo", "text=code"), "code is not a file: name one of its files"),
        (("evaluate", "demo", "text=code/a.py"), "code/a.py: unknown kind of file, text is read from"),
        (("evaluate", "./none", "text=text.txt"), "./none: no such file or directory, nor a hub id"),
        (("evaluate", "code", "text=text.txt"), "code: no config.json in it"),
        (("evaluate", "text.txt", "text=text.txt"), "text.txt: not a model"),
        (("evaluate", "demo", "tasks=sst2", "data=gone"), "data=gone: no such file or directory"),
        (("compress", "gptq", "calibration.text=none.txt"), "no such file: none.txt"),
        (("verify", "./none"), "/none: no such file or directory"),
    ],
)
def test_an_input_that_is_not_there_is_one_line_and_nothing_is_sent(
    fake: FakeJobs, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(AxiconError) as caught:
        run(*words[1:], verb=words[0])
    assert says in str(caught.value)
    assert fake.sent == []
    if words[0] != "verify":
        # Only where the cluster runs here is what is here what the job will find.
        monkeypatch.setattr(submit, "on_this_machine", lambda found: False)
        assert "succeeded" in run(*words[1:], verb=words[0])[-1]


def test_a_path_deep_in_a_recipe_is_made_absolute(fake: FakeJobs, tmp_path: Path) -> None:
    run("gptq", "calibration.text=text.txt", "out=made", verb="compress")
    words = fake.sent[0]["entrypoint"].split()[5:]
    assert words == ["gptq", f"calibration.text={tmp_path}/text.txt", f"out={tmp_path}/made"]


def test_a_recipe_file_of_this_machine_goes_by_its_place(fake: FakeJobs, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: demo\ntext: text.txt\nwindows: 3\n")
    run("mine.yaml", "windows=2")
    words = fake.sent[0]["entrypoint"].split()[5:]
    assert words[0] == f"{tmp_path}/mine.yaml"
    assert f"text={tmp_path}/text.txt" in words
    assert "windows=2" in words


def test_elsewhere_paths_are_left_alone_and_warned_about(
    fake: FakeJobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(submit, "on_this_machine", lambda found: False)
    said = run("demo", f"text={tmp_path}/text.txt", "data=code")
    assert fake.sent[0]["entrypoint"].endswith(f"evaluate demo text={tmp_path}/text.txt data=code")
    notes = [line for line in said if line.startswith("note: ")]
    assert f"note: text={tmp_path}/text.txt is a path of this machine" in "\n".join(notes)
    assert "note: out= is not given" in "\n".join(notes)
    (tmp_path / "code" / "text.txt").write_text("travels")
    todo = plan.make(command.axicon, "evaluate", ["demo", "text=text.txt"], here=False, sent=Path("code"))
    assert [warning for warning in todo.warnings if "text" in warning] == []


def test_a_verb_without_a_recipe_goes_by_the_places_it_is_given(fake: FakeJobs, tmp_path: Path) -> None:
    assert run("code", verb="lineage")[-1].startswith("lineage-")
    assert fake.sent[0]["entrypoint"] == f"exec python -m jobs lineage {tmp_path}/code"
    (tmp_path / "code" / "manifest.json").write_text("{}")
    fake.coming = [("SUCCEEDED", "")]
    run("code", verb="lineage")
    assert len({sent["submission_id"].removesuffix("-2") for sent in fake.sent}) == 2


def test_variables_are_passed_on_by_name_only(fake: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    said = run(env_keys=("MY_KEY",))
    assert fake.sent[0]["runtime_env"]["env_vars"]["MY_KEY"] == "secret"
    assert "secret" not in "\n".join(said)
    with pytest.raises(AxiconError, match="--env-keys NOT_THERE: not set"):
        run(env_keys=("MY_KEY", "NOT_THERE"))


def test_threads_of_the_recipe_are_those_of_every_library(fake: FakeJobs) -> None:
    run(*WORDS, "threads=2")
    assert fake.sent[0]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"


FAILED_LOG = """Running entrypoint for job x: exec python -m jobs evaluate demo
Traceback (most recent call last):
ValueError: something
axicon: text=none.txt: no such file
"""


@pytest.mark.parametrize(
    ("status", "log", "says"),
    [
        ("FAILED", FAILED_LOG, "x failed with exit code 2: text=none.txt: no such file"),
        ("FAILED", "a\nMemoryError: no\n at exit\n", "x failed with exit code 2: MemoryError: no"),
        ("FAILED", "", "x failed with exit code 2: node died"),
        ("STOPPED", "a\n", "x was stopped, and stopped is not a success"),
    ],
)
def test_every_end_but_success_is_a_failure_with_its_reason(
    fake: FakeJobs, status: str, log: str, says: str
) -> None:
    fake.add("x", "RUNNING")
    fake.jobs["x"].driver_exit_code, fake.jobs["x"].message = 2, "node died"
    fake.coming = [(status, log)]
    with pytest.raises(RunFailed) as caught:
        follow.follow(fake, "x", lambda line: None)
    assert str(caught.value).startswith(says)


def test_only_whole_lines_are_passed_on_once_each(fake: FakeJobs) -> None:
    fake.add("x", "RUNNING")
    fake.coming = [
        ("RUNNING", "one\ntw"),
        ("RUNNING", "one\ntwo\n 10%\r 20%\r"),
        ("SUCCEEDED", "one\ntwo\n 10%\r 20%\r100%\n\x1b[31mred\x1b[0m"),
    ]
    said: list[str] = []
    follow.follow(fake, "x", said.append)
    assert said == ["one", "two", "100%", "red"]


def test_ctrl_c_detaches_and_says_how_to_go_on(fake: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "get_job_logs", lambda name: signal.raise_signal(signal.SIGINT))
    with stop_on_signal(), pytest.raises(Stopped) as caught:
        run(id="mine", cluster="c")
    assert caught.value.did == "detached"
    assert "axicon submit --cluster c --follow mine" in caught.value.kept
    assert "axicon submit --cluster c --stop mine" in caught.value.kept
    assert fake.jobs["mine"].status == "RUNNING"


def test_detached_from_the_start(fake: FakeJobs) -> None:
    assert run(id="mine", detach=True)[-1].endswith("--follow mine shows its log")
    assert fake.jobs["mine"].status == "PENDING"


def test_stop_waits_for_the_end(fake: FakeJobs) -> None:
    said: list[str] = []
    fake.add("x", "RUNNING")
    submit.stop(submit.Submission(), "x", said.append)
    submit.stop(submit.Submission(), "x", said.append)
    assert said == ["x was stopped within 0 s", "x has ended already: STOPPED"]
    with pytest.raises(AxiconError, match="knows no job y; there are x"):
        submit.stop(submit.Submission(), "y", said.append)


def test_the_list_has_a_line_for_each_job(fake: FakeJobs) -> None:
    fake.add("x", "SUCCEEDED")
    [(name, status, _, took, what)] = submit.listing(submit.Submission())
    assert (name, status, took, what) == ("x", "SUCCEEDED", "3 s", "python -m jobs evaluate")


def test_a_full_disk_is_one_line_and_nothing_is_sent(fake: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parcel.shutil, "copy", full)
    with pytest.raises(AxiconError, match=r"code: cannot be copied to .* \(No space left on device\)"):
        run()
    assert fake.sent == []


def test_a_working_directory_that_is_not_there_is_one_line(fake: FakeJobs) -> None:
    with pytest.raises(AxiconError, match="--working-dir nowhere: no such directory"):
        run(working_dir=Path("nowhere"))


def test_another_ray_on_the_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard.Dashboard, "get", lambda self, path: {"ray_version": "2.41.0"})
    found = dashboard.Dashboard("http://127.0.0.1:1", "t", "here")
    with pytest.raises(AxiconError, match=r"runs Ray 2\.41\.0 and this is Ray"), submit.client(found):
        pass


@pytest.mark.parametrize(
    "words", [("submit",), ("submit", "--list", "version"), ("submit", "--stop", "x", "--list")]
)
def test_one_thing_at_a_time(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(list(words))
    assert caught.value.code == 2
    assert "give a verb to run, or one of --follow, --stop and --list" in capsys.readouterr().err
