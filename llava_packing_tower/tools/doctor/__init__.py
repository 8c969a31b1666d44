"""`llava-packing doctor`: what is here, what is broken, and the command that fixes it."""

from __future__ import annotations
