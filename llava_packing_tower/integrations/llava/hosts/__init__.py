"""The kinds of LLaVA, one file each; :mod:`..registry` lists them."""
