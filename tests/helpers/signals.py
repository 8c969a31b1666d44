"""Processes that are sent signals by the tests."""

import signal


def default_signals() -> None:
    """For ``preexec_fn``: whoever started the tests may ignore some (nohup), and programs leave those ignored."""
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
