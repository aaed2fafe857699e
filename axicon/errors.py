"""The one error a person is meant to read.

Everything a user can cause (a missing file, a pickle, a wrong key, too little memory) raises `AxiconError`:
one line that says what is wrong, where, and what to do. The edges print that line and exit with a code that
is not 0; anything else that escapes is a defect and keeps its traceback.
"""


class AxiconError(Exception):
    """What went wrong, where, and the way out, in one line."""


class RunFailed(AxiconError):
    """What was asked for was right, and something failed while it was done. Exit code 1 instead of 2."""


def counted(number: int, noun: str) -> str:
    """For sentences: 1 block, 2 blocks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
