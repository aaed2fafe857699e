"""How figures and tables look to a person, the same in every verb."""

from __future__ import annotations

from rich.console import Console

UNFOLDED = 4096


def console() -> Console:
    """Standard output: tables fold to a terminal, and keep every line whole in a file or a pipe."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = UNFOLDED
    return found


def size(count: int) -> str:
    """Bytes in powers of 1000: 269.1 MB."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}"


def duration(days: float) -> str:
    """5 min, 3 h, 12 days."""
    minutes = days * 24 * 60
    if minutes < 60:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if days < 2 else f"{days:.0f} days"
