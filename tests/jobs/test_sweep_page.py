"""`sweep.html` as a file, and, where Chromium is installed, as its readers meet it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.finetune_curves import write_curves
from jobs.finetune_recipe import FinetuneRecipe
from jobs.finetune_work import Evaluation
from jobs.page import PAGES, one_file
from jobs.sweep_page import render
from tests.chromium import Tab, needs_chromium, tab
from tests.jobs.sweep_example import compressions, finetunings, population

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><!-- <script> <img src=x onerror='window.owned=1'> \u2028 ${owned} &lt; 🦊"


def hostile() -> dict[str, Any]:
    document = compressions(7)
    one, two, three, four = document["trials"][:4]
    document["name"] = document["command"] = document["reason"] = HOSTILE
    one |= {"status": "failed", "reason": HOSTILE + "x" * 500, "trial": HOSTILE}
    two["metrics"]["perplexity"] = math.nan
    three["metrics"] |= {"perplexity": 1e300, "constructor": 1.0, "__proto__": 2.0}
    three["files"] = ["../../etc/passwd", "javascript:alert(1)", "/etc/passwd", "trials/a b"]
    four["settings"] = {"a" * 300 + ".b": "long " * 90, "compressor.bits": [3, 4], "hasOwnProperty": True}
    four["serve"] = HOSTILE
    return document


def embedded(page: str) -> Any:
    return json.loads(page.partition('id="document">')[2].partition("</script>")[0])


def digests(parts: Sequence[str]) -> set[str]:
    return {base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts}


@pytest.mark.parametrize("template", ["sweep.html", "curves.html"])
def test_a_page_needs_nothing_from_elsewhere(template: str) -> None:
    page = one_file(template, {})
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.search(r"\son\w+=\"|style=\"|url\(|@import|\beval\b|innerHTML|Function\(\"", page)
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[0]
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL)
    assert set(re.findall(r"'sha256-([^']*)'", policy[0])) == digests(inline)
    assert page.index("Content-Security-Policy") < page.index("<style>"), "it binds what comes behind it"


def test_every_part_is_in_a_page_and_is_short() -> None:
    linked = set()
    for page in (*PAGES.glob("*.html"), *(ROOT / "services" / "pages").glob("sweeps.html")):
        linked |= set(re.findall(r'(?:src|href)="(?:[^"]*/)?([\w-]+\.(?:js|css))"', page.read_text()))
    assert {path.name for path in PAGES.iterdir()} == {"sweep.html", "curves.html"} | linked - {"sweeps.js"}
    for path in PAGES.iterdir():
        lines = path.read_text().splitlines()
        assert len(lines) < 400, path.name
        assert max(map(len, lines)) <= 110, path.name


@pytest.mark.parametrize("template", ["sweep.html", "curves.html"])
def test_scripts_find_what_they_look_for(template: str) -> None:
    page = (PAGES / template).read_text()
    there = set(re.findall(r' id="([\w-]+)"', page))
    for name in re.findall(r'src="(?:[^"]*/)?([\w-]+\.js)"', page):
        wanted = set(re.findall(r'\$\("([\w-]+)"\)', (PAGES / name).read_text()))
        if (template, name) == ("curves.html", "curves.js"):
            wanted = {one for one in wanted if not one.startswith("learning")}
        assert wanted <= there, name


def test_the_colours_are_those_of_the_playground() -> None:
    def colours(path: Path) -> list[dict[str, str]]:
        blocks = re.findall(r":root[^{]*\{([^}]*)\}", path.read_text())[:2]
        return [dict(re.findall(r"(--[\w-]+): (#\w+)", block)) for block in blocks]

    for ours, theirs in zip(
        colours(PAGES / "page.css"), colours(ROOT / "services" / "pages" / "playground.css"), strict=True
    ):
        shared = ours.keys() & theirs.keys()
        assert len(shared) >= 9
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_hostile_text_ends_no_element_and_comes_back_as_it_was() -> None:
    page = render(hostile())
    assert "<img" not in page
    assert page.count("</script>") == render(compressions(0)).count("</script>")
    found = embedded(page)
    assert found["name"] == HOSTILE
    assert found["trials"][0]["reason"] == HOSTILE + "x" * 500
    assert found["trials"][1]["metrics"]["perplexity"] is None, "JSON has no NaN"


def test_the_document_inside_is_the_document() -> None:
    document = compressions()
    assert embedded(render(document)) == json.loads(json.dumps(document))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def opened(reader: Tab, tmp_path: Path) -> Any:
    """Opens the page of a document as a file."""

    def open_page(document: dict[str, Any], width: int = 1400) -> Tab:
        (tmp_path / "sweep.html").write_text(render(document))
        reader.size(width, 900)
        reader.troubles.clear()
        reader.go((tmp_path / "sweep.html").as_uri())
        return reader

    return open_page


WIDER = """(() => {
    const right = (node) => node.getBoundingClientRect().right;
    return [...document.querySelectorAll('main *')].filter((node) => !node.closest('.table, .scroll, pre') &&
        right(node) > right(node.closest('.card, main')) + 1).length;
})()"""
CASES = {
    "none": compressions(0), "one": compressions(1), "forty": compressions(), "steps": finetunings(),
    "many": compressions(500), "hostile": hostile(), "population": population(),
}  # fmt: skip


@needs_chromium
@pytest.mark.parametrize("case", CASES)
def test_it_draws_whatever_the_document_holds(opened: Any, case: str) -> None:
    document = CASES[case]
    page = opened(document)
    assert page.js("document.querySelectorAll('#rows tr').length") == len(document["trials"])
    for width in (320, 390, 1400) if len(document["trials"]) < 100 else (390,):
        page.size(width, 800, dark=width == 390)
        page.js("draw()")
        assert page.js("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.js(WIDER) == 0
    few = document["trials"][: 4 if len(document["trials"]) < 100 else 1]
    trials = json.dumps([trial["trial"] for trial in few])
    page.js(f"for (const trial of {trials}) state.select(trial)")
    assert page.troubles == []


@needs_chromium
def test_hostile_text_is_shown_and_does_nothing(opened: Any) -> None:
    page = opened(hostile())
    assert page.js("$('name').textContent") == HOSTILE
    assert page.js("window.owned") is None
    page.js(f"state.select({json.dumps(HOSTILE)})")
    assert page.js("document.querySelector('.why.failed').textContent").startswith(HOSTILE)
    page.js("state.select('0003')")
    links = page.js("[...$('details').querySelectorAll('a')].map((link) => link.getAttribute('href'))")
    assert links == ["./javascript%3Aalert(1)", "./trials/a%20b"], "names beside the page and nothing else"
    assert page.js("[...document.querySelectorAll('#rows td')].some((c) => c.textContent === 'not finite')")


@needs_chromium
def test_sorting_filtering_and_brushing(opened: Any) -> None:
    document = compressions()
    page = opened(document)
    column = "[...document.querySelectorAll('#rows tr')].map((row) => row.querySelector('.open').textContent)"
    trials = {trial["trial"]: trial for trial in document["trials"]}
    assert page.js(column)[0] == document["best"], "the first objective's best comes first"
    page.js("document.querySelector('[data-focus=\"sort-metric:perplexity\"]').focus()")
    for way in (1, -1):
        page.js("document.activeElement.click()")
        shown = [trials[name]["metrics"].get("perplexity") for name in page.js(column)]
        known = [value for value in shown if value is not None]
        assert known == sorted(known, key=lambda value: way * value)
        assert shown[len(known) :] == [None] * (40 - len(known)), "what has no value comes last"
        assert page.js("document.activeElement.dataset.focus") == "sort-metric:perplexity"
    page.js("$('words').value = 'bits=4 AWQ'; $('words').dispatchEvent(new Event('input'))")
    page.wait("state.shown.size < 40")
    four = [t for t in trials.values() if t["settings"]["compressor.bits"] == 4]
    wanted = {t["trial"] for t in four if t["settings"]["compressor.method"] == "awq"}
    assert set(page.js(column)) == wanted
    page.js("clearFilters()")
    page.js(
        "document.querySelector('[data-focus=\"setting:compressor.bits\"]').scrollIntoView({block: 'center'})"
    )
    grip = "document.querySelector('[data-focus=\"setting:compressor.bits\"] .grip').getBoundingClientRect()"
    x, y, height = page.js(f"[{grip}.x + {grip}.width / 2, {grip}.y, {grip}.height]")
    page.drag((x, y + height * 0.55), (x, y + height * 0.99))  # the lower half: 2 and 3
    assert {trials[name]["settings"]["compressor.bits"] for name in page.js(column)} == {2, 3}
    page.press("Escape")
    assert page.js("state.shown.size") == 40
    assert page.troubles == []


@needs_chromium
def test_without_a_mouse_one_gets_from_the_front_to_a_trial_and_back(opened: Any) -> None:
    page = opened(compressions())
    page.js("document.querySelector('#front svg').focus()")
    page.press("ArrowRight")
    said = page.js("$('said').textContent")
    trial = re.findall(r"^Trial (\d+): status finished, bytes [\d.]+ MB, perplexity", said)
    assert len(trial) == 1
    page.press("Enter")
    assert page.js("$('details-title').textContent") == f"Trial {trial[0]}"
    assert page.js("$('details').contains(document.activeElement)")
    assert page.js("$('details').querySelector('code').textContent").startswith("axicon serve ")
    page.press("Escape")
    assert page.js("$('details').hidden")
    assert page.js("document.activeElement.dataset.focus") == "front"


@needs_chromium
def test_the_front_is_that_of_a_plain_search(opened: Any) -> None:
    page = opened(compressions(0))
    draw = random.Random(3)
    trials = [
        {
            "trial": str(i), "status": draw.choice(["finished", "finished", "failed"]),
            "within_limits": draw.random() < 0.8, 
            "metrics": {k: draw.randint(0, 9) for k in "abc"[: draw.randint(2, 3)]},
        }
        for i in range(80)
    ]  # fmt: skip
    for names in ("ab", "abc"):
        ways = {"a": 1, "b": -1, "c": 1}
        able = [t for t in trials if t["status"] == "finished" and t["within_limits"]]
        able = [t for t in able if set(names) <= t["metrics"].keys()]
        cost = {t["trial"]: [ways[n] * t["metrics"][n] for n in names] for t in able}
        wanted = {
            one for one, mine in cost.items()
            if not any(all(a <= b for a, b in zip(x, mine, strict=True)) and x != mine for x in cost.values())
        }  # fmt: skip
        axes = ", ".join(
            f"{{ way: '{'min' if ways[n] > 0 else 'max'}', get: (t) => t.metrics.{n} }}" for n in names
        )
        found = page.js(f"[...frontOf({json.dumps(trials)}, [{axes}])].map((t) => t.trial)")
        assert set(found) == wanted


@needs_chromium
def test_importance_is_the_statistic_of_kruskal_and_wallis(opened: Any) -> None:
    document = compressions()
    for trial in document["trials"]:
        if "bytes" in trial["metrics"]:
            trial["metrics"]["bytes"] = round(trial["metrics"]["bytes"], -7)  # so that many are equal
    page = opened(document)
    shown = page.js(
        "Object.fromEntries([...document.querySelectorAll('#importance .figure')]"
        ".map((node) => [node.dataset.setting, Number(node.dataset.share)]))"
    )
    rows = [t for t in document["trials"] if t["status"] == "finished" and "bytes" in t["metrics"]]
    for key in ("compressor.method", "compressor.bits", "compressor.group"):
        groups: dict[Any, list[float]] = {}
        for row in rows:
            groups.setdefault(row["settings"][key], []).append(row["metrics"]["bytes"])
        assert shown[key] == pytest.approx(kruskal(list(groups.values())) / (len(rows) - 1), abs=1e-6)
    assert f"n = {len(rows)} finished trials" in page.js("$('importance-note').textContent")


def kruskal(groups: Sequence[Sequence[float]]) -> float:
    """H with its correction for ties, as its authors write it."""
    values = sorted(value for group in groups for value in group)
    n = len(values)
    rank = {value: values.index(value) + (values.count(value) + 1) / 2 for value in set(values)}
    h = 12 / (n * (n + 1)) * sum(sum(rank[v] for v in g) ** 2 / len(g) for g in groups) - 3 * (n + 1)
    return h / (1 - sum(values.count(v) ** 3 - values.count(v) for v in set(values)) / (n**3 - n))


@needs_chromium
def test_methods_read_as_they_are_typed_and_a_value_of_its_own_explains_nothing(opened: Any) -> None:
    document = finetunings()
    for i, trial in enumerate(document["trials"]):
        trial["settings"] = {"rule": {"method": "zo_sgd", "lr": i / 1000}, "chain": ["wanda", "gptq"]}
    document["parameters"] = []
    page = opened(document)
    text = page.js("$('rows').textContent")
    assert "zo_sgd lr=0.004" in text
    assert "wanda, gptq" in text
    reasons = page.js("[...document.querySelectorAll('#importance .none')].map((node) => node.textContent)")
    assert sorted(reasons) == ["has one value only", "n = 11: too few to tell, it takes 22"]


@needs_chromium
def test_a_setting_without_effect_is_rarely_above_its_tick(opened: Any) -> None:
    # 400 tests at 5 %: 20 on average with a deviation of 4.4; outside of 6 to 36 less than once in 1000.
    page = opened(compressions(0))
    above = page.js("""(() => {
        const random = randomFrom(7), metric = { way: "min", get: (trial) => trial.metric };
        const settings = Array.from({ length: 4 }, (_, i) => ({ get: (trial) => trial.settings[i] }));
        let above = 0;
        for (let round = 0; round < 100; round++) {
            const trials = Array.from({ length: 24 }, () => ({
                status: "finished", metric: random(),
                settings: [random() < 0.5, Math.floor(random() * 4), random(), random() < 0.3 ? "a" : "b"],
            }));
            const { found } = importanceOf(trials, metric, settings);
            above += found.filter((one) => one.share > one.chance).length;
        }
        return above;
    })()""")  # fmt: skip
    assert 6 <= above <= 36


@needs_chromium
def test_curves_of_a_finetuning_are_drawn_by_the_same_code(reader: Tab, tmp_path: Path) -> None:
    losses = [(step, math.nan if step == 30 else 2.0 / step) for step in range(1, 61)]
    found = [Evaluation(step, 2.0 / (step + 1), 0.5 + step / 200, 100) for step in (0, 30, 60)]
    write_curves(tmp_path, FinetuneRecipe(), losses, found, 30)
    for width in (320, 1100):
        reader.size(width, 800, dark=width == 320)
        reader.troubles.clear()
        reader.go((tmp_path / "curves.html").as_uri())
        assert reader.js("document.querySelectorAll('#loss path.curve').length") == 3
        assert reader.js("document.querySelectorAll('#accuracy circle.end').length") == 3
        # A loss that is no number is a gap: the line of single steps is begun twice.
        assert (
            reader.js("document.querySelector('#loss path.plain').getAttribute('d').match(/M/g).length") == 2
        )
        assert reader.js("[...$('rows').rows].map((row) => row.cells[0].textContent)") == ["0", "30 ★", "60"]
        assert reader.js(WIDER) == 0
        assert reader.troubles == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The folder of the test over HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@needs_chromium
def test_over_http_it_follows_and_keeps_sort_filter_scroll_and_focus(
    reader: Tab, address: str, tmp_path: Path
) -> None:
    document = compressions()
    (tmp_path / "sweep.html").write_text(render(document))
    (tmp_path / "sweep.json").write_text(json.dumps(document))
    reader.size(1100, 700)
    reader.troubles.clear()
    reader.go(f"{address}/sweep.html")
    reader.wait("$('live').textContent.startsWith('Live')")
    reader.js("document.querySelector('[data-focus=\"sort-metric:perplexity\"]').click()")
    reader.js("document.querySelector('[data-focus=\"only-finished\"]').click()")
    reader.js("$('front-z').value = ''; $('front-z').dispatchEvent(new Event('change'))")
    reader.js("document.querySelector('[data-focus=\"row-0020\"]').focus({ preventScroll: true })")
    reader.js(
        "const box = document.querySelector('.table');"
        "scrollTo(0, 900); box.scrollTop = 200; box.scrollLeft = 90"
    )
    kept = """JSON.stringify([scrollY, box.scrollTop, box.scrollLeft, document.activeElement.dataset.focus,
        $('front-z').value, document.querySelector('[data-focus="only-finished"]').ariaPressed,
        document.querySelector('th[aria-sort="ascending"] button').dataset.focus])"""
    before = reader.js(kept)
    count = reader.js("document.querySelectorAll('#rows tr').length")
    more = compressions(52)
    (tmp_path / "sweep.json").write_text(json.dumps(more))
    reader.js("document.dispatchEvent(new Event('visibilitychange'))")  # rather than wait three seconds
    reader.wait(f"document.querySelectorAll('#rows tr').length > {count}")
    assert reader.js(kept) == before
    finished = sum(trial["status"] == "finished" for trial in more["trials"])
    assert reader.js("document.querySelectorAll('#rows tr').length") == finished
    assert reader.troubles == []
    (tmp_path / "sweep.json").write_text(json.dumps(more | {"format_version": 2}))
    reader.js("document.dispatchEvent(new Event('visibilitychange'))")
    reader.wait("$('live').textContent.includes('format 2') && $('live').classList.contains('bad')")
    (tmp_path / "sweep.json").unlink()
    reader.js("document.dispatchEvent(new Event('visibilitychange'))")
    reader.wait("$('live').textContent.includes('404')")
    assert "Shown as of" in reader.js("$('live').textContent")
