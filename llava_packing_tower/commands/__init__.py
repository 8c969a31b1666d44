"""One module per `llava-packing` command; see `llava_packing_tower.cli`."""
