"""What a user should read while a model trains, whoever has started the training."""

from __future__ import annotations

import logging
import os
import sys


def say(logger: logging.Logger, message: str, *values: object) -> None:
    """Log at INFO. Where nobody is shown that, as in LLaVA's own train scripts, the first rank writes it to stderr."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(message, *values)
    elif os.environ.get("RANK", "0") == "0":
        print(message % values, file=sys.stderr, flush=True)
