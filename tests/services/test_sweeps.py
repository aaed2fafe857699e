"""`/sweeps`: what is shown of a folder, to whom, and that nothing else of the machine is."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from axicon.recipe import LocalServeRecipe, ServeRecipe
from jobs import prepare
from services.errors import ApiError
from services.sweeps import PARTS, Sweeps
from tests.chromium import needs_chromium, tab
from tests.jobs.sweep_example import compressions, finetunings
from tests.services.live import Live, serving
from tests.services.test_completions import refused

KEY = "sk-of-a-reader"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps, and much that is none."""
    root = tmp_path_factory.mktemp("served")
    folder, outside = root / "sweeps", root / "outside"
    for place, document in (
        (folder / "one", compressions(6)), (folder / "two words é", finetunings()),
        (outside, compressions(1)), (root, compressions(1)),
    ):  # fmt: skip
        place.mkdir(parents=True, exist_ok=True)
        (place / "sweep.json").write_text(json.dumps(document))
        (place / "sweep.html").write_text("<script>of the folder</script>")
        (place / "ledger.jsonl").write_text("{}\n")
    (folder / "linked").symlink_to(outside)
    (folder / "inner").mkdir()
    (folder / "inner" / "sweep.json").symlink_to(outside / "sweep.json")
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "sweep.json")
    (folder / "broken").mkdir()
    (folder / "broken" / "sweep.json").write_text('{"trials": [')
    (folder / "empty").mkdir()
    (folder / ".hidden.tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with serving(ServeRecipe(sweeps=folder)) as running:
        yield running


def raw(live: Live, path: str) -> int:
    """The status of a path that no client has put in order."""
    connection = http.client.HTTPConnection("127.0.0.1", int(live.url.rsplit(":", 1)[1]), timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_list_tells_what_a_sweep_has_found(live: Live) -> None:
    found = {one["sweep"]: one for one in live.client.get("/sweeps/index.json").json()["sweeps"]}
    assert set(found) == {"one", "two words é", "broken"}
    assert found["broken"] == {"sweep": "broken", "status": "unreadable"}
    document = compressions(6)
    one = found["one"]
    assert (one["name"], one["status"], one["wanted"]) == ("smaller-demo", document["status"], 14)
    assert one["ended"] == sum(trial["status"] != "running" for trial in document["trials"])
    best = next(trial for trial in document["trials"] if trial["trial"] == document["best"])
    assert one["figures"]["bytes"] == best["metrics"]["bytes"]


def test_a_document_is_the_file_and_is_sent_again_only_when_it_changed(live: Live, folder: Path) -> None:
    file = folder / "one" / "sweep.json"
    first = live.client.get("/sweeps/one/sweep.json")
    assert first.content == file.read_bytes()
    assert first.headers["content-type"] == "application/json"
    again = live.client.get("/sweeps/one/sweep.json", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    file.with_name("new").write_text(json.dumps(compressions(6, seed=5)))
    file.with_name("new").replace(file)
    changed = live.client.get("/sweeps/one/sweep.json", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.content == file.read_bytes() != first.content
    listed = live.client.get("/sweeps/index.json").json()["sweeps"]
    assert [one["best"] for one in listed if one["sweep"] == "one"] == [changed.json()["best"]]


@pytest.mark.parametrize(
    "path", ["/sweeps", "/sweeps/one/sweep.html", "/sweeps/two%20words%20%C3%A9/sweep.html"]
)
def test_the_page_is_that_of_the_package_under_the_strict_policy(live: Live, path: str) -> None:
    page = live.client.get(path)
    assert page.status_code == 200
    assert "of the folder" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert not re.search(r"<style|style=|\son\w+=", page.text), "the policy forbids what is inline"
    assert not re.search(r'<script(?![^>]*(?:src=|type="application/json"))', page.text)
    base = path.rpartition("/")[0]
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        part = live.client.get(f"{base}/{link}")
        assert part.status_code == 200, link
        assert not re.search(r"https?://(?!www\.w3\.org/)", part.text), link


@pytest.mark.parametrize(
    "path",
    [
        "/sweeps/linked/sweep.json", "/sweeps/inner/sweep.json", "/sweeps/piped/sweep.json",
        "/sweeps/empty/sweep.json", "/sweeps/none/sweep.json", "/sweeps/../outside/sweep.json",
        "/sweeps/..%2Foutside/sweep.json", "/sweeps/%2e%2e/sweep.json", "/sweeps/./sweep.json",
        "/sweeps//sweep.json", "/sweeps/one%00/sweep.json", "/sweeps/one/ledger.jsonl", "/sweeps/one/new",
        "/sweeps/one/../one/ledger.jsonl", "/sweeps/one/", "/sweeps/", "/sweeps/one/trials/0001",
        "/sweeps/%2Fetc/sweep.json", "/sweeps/" + "a" * 300 + "/sweep.json", "/sweeps/pages/../auth.py",
        "/sweeps/pages/sweep.py", "/sweeps/.hidden.tmp/sweep.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(live: Live, path: str) -> None:
    assert raw(live, path) == 404


@pytest.mark.parametrize("name", ["..", "../outside", "one/../../outside", "/", "", ".", "one\0"])
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(ApiError, match="no sweep"):
        Sweeps(folder).read(name)


def test_a_folder_that_is_itself_a_sweep_is_one(folder: Path) -> None:
    sweeps = Sweeps(folder / "one")
    assert sweeps.names() == ["one"]
    assert sweeps.read("one").content == (folder / "one" / "sweep.json").read_bytes()
    with pytest.raises(ApiError):
        sweeps.read("two words é")


def test_a_document_without_an_end_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sweeps.MOST_BYTES", 1000)
    with pytest.raises(ApiError, match="too large") as caught:
        Sweeps(folder).read("one")
    assert caught.value.status == 500
    assert {"sweep": "one", "status": "unreadable"} in Sweeps(folder).index()


def test_with_keys_pages_are_open_and_what_they_show_is_not(folder: Path) -> None:
    recipe = ServeRecipe(sweeps=folder, api_key_hashes=(hashlib.sha256(KEY.encode()).hexdigest(),))
    pages = ["/sweeps", "/sweeps/one/sweep.html", "/sweeps/none/sweep.html", "/sweeps/pages/sweeps.js"]
    data = [
        "/sweeps/index.json", "/sweeps/one/sweep.json", "/sweeps/pages/sweep.json",
        "/sweeps/one/ledger.jsonl", "/sweeps/pages/../one/sweep.json", "/sweeps/one/sweep.html/",
        "/sweepsone/sweep.html",
    ]  # fmt: skip
    with serving(recipe) as live:
        for path in pages + [f"/sweeps/pages/{part}" for part in PARTS]:
            assert live.client.get(path).status_code == 200, path
        # An empty page tells strangers nothing, not even whether there is such a sweep.
        assert live.client.get(pages[1]).content == live.client.get(pages[2]).content
        for path in data:
            assert raw(live, path) == 401, path
        for path in data[:2]:
            answer = live.client.get(path, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code == 200


def test_without_keys_only_loopback_names_are_answered(live: Live) -> None:
    for path in ("/sweeps", "/sweeps/index.json", "/sweeps/one/sweep.json"):
        response = live.client.get(path, headers={"Host": "evil.example"})
        assert refused(response, 403)[1] == "host_not_allowed"


def test_without_a_folder_there_is_no_page(tmp_path: Path) -> None:
    with serving() as live:
        for path in ("/sweeps", "/sweeps/index.json", "/sweeps/one/sweep.html", "/sweeps/one/sweep.json"):
            assert refused(live.client.get(path), 404)[1] == "no_sweeps"
    with serving(ServeRecipe(sweeps=tmp_path / "gone")) as live:
        response = live.client.get("/sweeps/index.json")
        assert refused(response, 404)[1] == "no_sweeps"
        assert "sweeps=" in response.json()["error"]["message"]


def test_a_folder_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = LocalServeRecipe.parse(["sweeps=gone"])
    assert recipe.sweeps == tmp_path / "gone"
    with pytest.raises(AxiconError, match="sweeps="):
        prepare.look(recipe)


@needs_chromium
def test_a_browser_reads_them_with_a_key_typed_once(folder: Path, tmp_path: Path) -> None:
    recipe = ServeRecipe(sweeps=folder, api_key_hashes=(hashlib.sha256(KEY.encode()).hexdigest(),))
    with serving(recipe) as live, tab(tmp_path) as page:
        page.size(390, 800, dark=True)
        page.go(f"{live.url}/sweeps")
        page.wait("$('live').textContent.includes('API key')")
        [asked] = page.troubles
        assert "401" in asked, "that it was refused, and nothing that the policy forbids"
        page.troubles.clear()
        page.js(f"$('key').value = '{KEY}'; $('key').dispatchEvent(new Event('change'))")
        page.wait("document.querySelectorAll('#rows a').length === 2")
        assert page.js("$('rows').textContent").count("cannot be read") == 1
        page.js("document.querySelector('#rows a[href*=two]').click()")
        page.wait("document.querySelector('#learning svg') !== null")
        assert page.js("$('name').textContent") == "learning-rate"
        assert page.js("document.querySelectorAll('#rows tr').length") == 18
        page.js("state.select(state.document.best)")
        assert page.js("$('details').querySelectorAll('a').length") == 0, "no link to what is not served"
        assert page.troubles == []
