"""One module per `llava-packing` command; see :mod:`main`."""
