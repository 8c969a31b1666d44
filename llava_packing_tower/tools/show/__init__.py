"""What a tower sees of images and videos: sizes, patches, tokens, positions, and a picture of them."""
