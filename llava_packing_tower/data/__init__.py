"""From pixels to packed rows: image processors, resizing, patches, positions and segments."""
