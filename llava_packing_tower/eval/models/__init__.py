"""What lmms-eval 0.5 reads with ``LMMS_EVAL_PLUGINS=llava_packing_tower.eval``."""

AVAILABLE_MODELS = {"llava_packing": "LlavaPacking"}
