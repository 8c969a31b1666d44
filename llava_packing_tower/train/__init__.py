"""`llava-packing train`: the configuration, the launcher, and what runs on each rank."""
