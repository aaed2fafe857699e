"""Names and values of a card's figures as a person reads them."""

from __future__ import annotations

from jobs.shown import size

LABELS = {
    "bytes": "weights",
    "bytes/embedding": "of these the embedding",
    "bytes/blocks": "of these the blocks",
    "bytes/head": "of these the head",
    "perplexity": "perplexity",
    "agreement/prefix": "greedy tokens before the first difference",
    "agreement/equal": "greedy texts that are equal",
    "tokens_per_s/1": "tokens/s, 1 stream",
    "tokens_per_s/8": "tokens/s, 8 streams",
    "first_token_ms": "first token",
    "peak_memory": "peak memory",
    "outliers/max_inf_norm": "largest activation",
    "outliers/kurtosis": "kurtosis of activations",
}
METRICS = {"acc": "accuracy", "acc_norm": "accuracy by length", "f1": "F1"}


def label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    task, _, metric = name.partition("/")
    return f"{task}, {METRICS.get(metric, metric)}"


def written(name: str, value: float) -> str:
    """A figure with its unit, as precise as it is worth."""
    if name.startswith("bytes") or name == "peak_memory":
        return size(int(value))
    if name.startswith("agreement/"):
        return f"{100 * value:.1f} %"
    if name.endswith(("/acc", "/acc_norm")):
        return f"{100 * value:.1f} %"
    if name == "first_token_ms":
        return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
    if name.startswith("tokens_per_s"):
        return f"{value:.1f}"
    if name.startswith("outliers/"):
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.3f}"
