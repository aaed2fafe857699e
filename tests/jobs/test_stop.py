"""How a verb ends on a signal: one exception, one line, an exit code that is not 0."""

from __future__ import annotations

import signal

import pytest

from jobs import __main__ as command
from jobs import stop


def test_signals_end_it_and_are_given_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in stop.SIGNALS:
        with pytest.raises(stop.Stopped), stop.stop_on_signal():
            signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_hurries_and_a_third_is_too_late() -> None:
    with stop.stop_on_signal():
        for _ in range(2):
            with pytest.raises(stop.Stopped):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_sigint_counts_even_where_the_shell_had_it_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(stop.Stopped), stop.stop_on_signal():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_every_verb_says_that_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(command.axicon.commands["version"], "callback", lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as caught:
        command.main(["version"])
    assert caught.value.code == code
    assert capsys.readouterr().err == f"axicon: stopped; {stop.NOTHING_KEPT}\n"
