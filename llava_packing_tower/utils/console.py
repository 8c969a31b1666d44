"""Text on the terminal with the names of files in it."""

from __future__ import annotations

from rich.console import Console


def plain_console(width: int, markup: bool = False, highlight: bool = True, stderr: bool = False) -> Console:
    """Prints text as it is: ``[red]`` or ``:car:`` in the name of a folder is no markup and no emoji.

    width: of what is no terminal; rich would take 80 columns and cut tables. markup: for those who escape names.
    stderr: for errors.
    """
    console = Console(markup=markup, emoji=False, highlight=highlight, stderr=stderr)
    if not console.is_terminal:
        console.width = width
    return console
