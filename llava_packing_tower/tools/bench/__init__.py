"""`llava-packing bench`: packed encoders beside other implementations, in one process, interleaved.

``workloads`` says what is run, ``presets`` on which models, ``systems`` and ``peers`` who runs it, ``measure`` how it
is timed, ``targets`` what is asked for, ``report`` how it is shown; ``scaling`` and ``breakdown`` are views of the
packed encoders alone; ``session`` is one call of the command.
"""
