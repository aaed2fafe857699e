"""How a verb ends on a signal: one exception, one line, an exit code that is not 0."""

from __future__ import annotations

import ctypes
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


def test_a_signal_is_noted_where_raising_would_get_lost_and_the_next_one_is_raised() -> None:
    found: list[stop.Stopped] = []
    with stop.stop_on_signal():
        with stop.noted(found.append):
            signal.raise_signal(signal.SIGTERM)
            assert [one.exit_code for one in found] == [143]
            with pytest.raises(stop.Stopped):
                signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stop.Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert len(found) == 1


def test_what_ray_has_wrapped_comes_out_as_it_was() -> None:
    with pytest.raises(stop.Stopped), stop.unwrapped():
        raise SystemError("wait returned a result with an exception set") from stop.Stopped()
    with pytest.raises(SystemError), stop.unwrapped():
        raise SystemError


@pytest.mark.parametrize("beneath", [True, False])
def test_a_handler_that_ray_has_set_is_gone(beneath: bool) -> None:
    """Ray sets one in Python and, when a process is a driver, one beneath it that Python does not know of."""
    stop.rearm()
    with stop.stop_on_signal():
        if beneath:
            ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))  # SIG_IGN
        else:
            signal.signal(signal.SIGTERM, lambda *_: None)
        signal.raise_signal(signal.SIGTERM)
        stop.rearm()
        with pytest.raises(stop.Stopped):
            signal.raise_signal(signal.SIGTERM)


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
