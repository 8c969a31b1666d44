"""`llava-packing doctor`: what is installed, what is broken, and the command that fixes it."""

from __future__ import annotations
