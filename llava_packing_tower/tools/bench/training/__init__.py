"""`llava-packing bench --training-step`: a whole training step beside stock LLaVA-NeXT's, in one process.

``photos`` makes the batches, ``models`` the models, ``rows`` says what is measured and asked for, ``trials`` runs
it, ``report`` shows it; ``session`` is one call of the command.
"""
