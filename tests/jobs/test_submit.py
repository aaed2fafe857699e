"""`axicon submit` without a cluster: what is sent, under which name, and how a job is followed to its end."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axicon.errors import AxiconError, RunFailed
from axicon.recipe import EvaluateRecipe
from jobs import __main__ as command
from jobs import dashboard, follow, parcel, plan, submit, submitted
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
    text, out = tmp_path / "text.txt", tmp_path / "artifacts" / "evaluate"
    assert sent["entrypoint"] == f"exec python -m jobs evaluate demo windows=2 text={text} out={out}"
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "demo", "txt=text.txt"), "unknown key 'txt': did you mean 'text'?"),
        (("evaluate", "demo", "windows=0"), "windows=0: must be greater"),
        (("evaluat", "demo"), "no such verb 'evaluat'"),
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


def test_the_parcel_holds_what_ray_would_send(tmp_path: Path) -> None:
    """Beside Ray's own archive of the same folder."""
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    for name in ("a.py", "b/c.py", "b/large.bin", "b/.gitignore", ".git/x", "x/__pycache__/y", "kept.log"):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text(name * 100)
    (tmp_path / "w" / "b" / ".gitignore").write_text("*.bin\n")
    (tmp_path / "w" / ".rayignore").write_text("*.log\n!kept.log\n")
    target = tmp_path / "theirs.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(tmp_path / "w"), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as theirs:
        names = {name for name in theirs.namelist() if not name.endswith("/")}
    ours = parcel.look(tmp_path / "w")
    assert {str(path) for _, path in ours.files} == names
    assert target.stat().st_size <= ours.bytes <= target.stat().st_size + 1000


def test_a_full_disk_is_one_line_and_nothing_is_sent(fake: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parcel.shutil, "copy", full)
    with pytest.raises(AxiconError, match=r"code: cannot be copied to .* \(No space left on device\)"):
        run()
    assert fake.sent == []


def test_too_large_an_upload_names_the_largest_files(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"part{number}.bin").write_bytes(bytes(number * 2**18))
    with pytest.raises(AxiconError) as caught:
        parcel.look(tmp_path, limit=2**21)
    text = str(caught.value)
    assert "5.3 MiB would be sent, and a cluster takes 2; largest are part6.bin (1.5 MiB), part5.bin" in text
    assert str(tmp_path / ".rayignore") in text
    assert "part1.bin" not in text
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert [str(path) for _, path in parcel.look(tmp_path, limit=2**20).files] == [".rayignore"]


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


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    monkeypatch.setenv(submitted.JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "me"}}))
    monkeypatch.setattr(submitted, "step_back", lambda: None)
    monkeypatch.setattr(submitted, "present", lambda kind: contextlib.nullcontext())

    def beside(servers: list[int]) -> None:
        monkeypatch.setattr(submitted, "living", lambda kind: servers)

    return beside


def test_beside_a_server_a_job_takes_one_thread_and_says_so(
    in_a_job: Callable[[list[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_a_job([77])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads == 1
    assert "job me, recipe " in (said := capsys.readouterr().err)
    assert "1 thread: a server runs on this machine (process 77)" in said
    assert submitted.begin("evaluate", EvaluateRecipe(threads=2)).threads == 2
    in_a_job([])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads is None


def test_a_job_steps_back_as_a_thread_and_as_a_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(submitted, "SESSION", tmp_path / "autogroup")
    monkeypatch.setattr(os, "nice", done.append)
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _: done.append(policy), raising=False)
    submitted.step_back()
    assert done[0] == 19
    assert done[1:] == ([os.SCHED_IDLE] if hasattr(os, "SCHED_IDLE") else [])
    assert (tmp_path / "autogroup").read_text() == "19"
    monkeypatch.setattr(submitted, "SESSION", tmp_path / "not" / "there")
    submitted.step_back()


def test_outside_a_job_nothing_is_said_or_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitted, "living", lambda kind: [77])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads is None
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_are_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with monkeypatch.context() as inside:
        for name in submitted.WHOLE_LINES:
            inside.setenv(name, "x")
            inside.delenv(name)
        submitted.keep_lines_whole()
        assert os.environ["TQDM_DISABLE"] == "1"
