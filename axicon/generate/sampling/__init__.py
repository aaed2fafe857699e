"""From logits to a token: processing, truncation, and the samplers that draw.

The order is fixed, because exactness depends on it: bias and bans, penalties, temperature, softmax,
truncation to the top, renormalising, drawing. Reported log-probabilities come from the raw logits.
"""

from __future__ import annotations

from axicon.generate.sampling.gumbel import GumbelMax
from axicon.protocols import Sampler

SAMPLERS: dict[str, type[Sampler]] = {"gumbel": GumbelMax}
"""Ways to draw a token, by name."""
