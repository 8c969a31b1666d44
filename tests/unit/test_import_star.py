"""`from llava_packing_tower import *`: every name that is promised can be had, on every supported transformers."""

import pytest

import llava_packing_tower


@pytest.mark.newest
def test_every_promised_name_is_there():
    found: dict[str, object] = {}
    exec("from llava_packing_tower import *", found)
    assert set(llava_packing_tower.__all__) <= set(found)
    assert {"HEVCViTPackingVisionTower", "Siglip2NaflexPacking", "image_to_packing_input"} <= set(found)
