import os
import signal

import pytest

from ddpm.runtime import signals
from ddpm.runtime.signals import Interrupted, die_with_parent, signals_deferred


def test_a_parent_that_died_early_stops_the_stage_too(monkeypatch):
    calls = []
    parents = iter([100, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda name: type("C", (), {"prctl": lambda _, *a: calls.append(a)})())
    with pytest.raises(Interrupted):
        die_with_parent(shares_group=False)
    assert calls == [(1, signal.SIGTERM)]


def test_deferred_signals_are_collected_and_handlers_restored():
    before = [signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(KeyError), signals_deferred() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGTERM, signal.SIGINT]
            raise KeyError  # restored however the block ends
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
