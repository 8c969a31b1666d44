"""`llava-packing doctor`: what is here, what is broken, and the command that mends it."""

from __future__ import annotations
