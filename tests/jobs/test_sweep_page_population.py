"""The page of a population: what a segment came from, in words and in its curve."""

from __future__ import annotations

from pathlib import Path

from jobs.sweep_page import render
from tests.chromium import needs_chromium, tab
from tests.jobs.sweep_example import population


@needs_chromium
def test_a_segment_says_what_it_came_from_and_its_curve_begins_there(tmp_path: Path) -> None:
    (tmp_path / "sweep.html").write_text(render(population()))
    with tab(tmp_path / "profile") as page:
        page.go((tmp_path / "sweep.html").as_uri())
        descent = "0009 (to step 30) ← 0005 (to step 20) ← 0001 (to step 10)"
        assert page.js("$('best').querySelector('.note').textContent") == descent
        curves = page.js(
            "[...document.querySelectorAll('#learning path.curve')].map((c) => c.getAttribute('d'))"
        )
        assert sorted("L" in one for one in curves) == [False] * 4 + [True] * 8
        page.js("state.select('0008')")
        assert "began from0008 (to step 20) ← 0001 (to step 10)" in page.js("$('details').textContent")
        assert page.troubles == []
