"""One live server with a stand-in engine for all tests of a file that ask for no settings of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from axicon.recipe import RequestLimits, ServeRecipe
from tests.services.live import Live, serving

LIMITS = RequestLimits(
    body_bytes=20_000,
    prompts=4,
    prompt_tokens=100,
    output_tokens=60,
    n=3,
    stops=4,
    stop_chars=20,
    logprobs=5,
    logit_bias=3,
)
RECIPE = ServeRecipe(max_rows=4, max_queue=8, limits=LIMITS)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(RECIPE) as running:
        yield running
