"""The operations of a fused encoder block: plain torch in `reference`, Triton in `triton/`."""
