"""`llava-packing probe`: towers on an image folder, without a decoder."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from families import ALL_FAMILIES, GOLDEN_FAMILIES
from PIL import Image

from llava_packing_tower.cli.main import main
from llava_packing_tower.eval import probe

pytest.importorskip("sklearn")
CLASSES = ("dots", "stripes", "waves")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from llava_packing_tower.tools.demo.tiny_models import make_tower

    folder = tmp_path_factory.mktemp("tower") / "vit_packing"
    make_tower(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three textures, 8 images each, every one of another shape and with noise."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(8):
            height, width = 60 + 11 * number, 150 - 9 * number
            y, x = np.mgrid[:height, :width]
            pattern = [(x // 7 + y // 7) % 2, (x // 10) % 2, (np.sin(x / 6) + np.sin(y / 15)) > 0][kind]
            pixels = pattern[..., None] * np.array([180, 120, 60]) + noise.integers(0, 60, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_folders_are_split_by_class_and_the_same_way_every_time(photos, tmp_path):
    first, second = probe.read_folder(photos), probe.read_folder(photos)
    assert first.classes == CLASSES and len(first.files) == 24
    assert (first.is_test == second.is_test).all()
    assert [int(first.is_test[first.labels == c].sum()) for c in range(3)] == [2, 2, 2]
    assert all(file.parent.name == CLASSES[label] for file, label in zip(first.files, first.labels))
    for split, count in (("train", 5), ("val", 3)):
        for name in CLASSES[:2]:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 20)).save(tmp_path / split / name / f"{number}.jpg")
    given = probe.read_folder(tmp_path)
    assert given.is_test.sum() == 6 and all("val" in f.parts for f, t in zip(given.files, given.is_test) if t)


def test_folders_that_cannot_be_used_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="has 0 classes"):
        probe.read_folder(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("one/a.png", "two/a.png", "two/b.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    with pytest.raises(ValueError, match="class 'one' has 1 image"):
        probe.read_folder(tmp_path)


def test_features_are_those_of_each_image_alone(tower, photos):
    loaded = probe.load_tower(str(tower))
    files = probe.read_folder(photos).files[:7]
    together, counts = probe.features(loaded, files, batch_size=5)
    assert len(set(counts.tolist())) > 2, "images of several shapes"
    for file, vector, count in zip(files, together, counts):
        pixels = loaded.image_processor.preprocess(Image.open(file), return_tensors="pt")["pixel_values"][0]
        with torch.inference_mode():
            alone = loaded(pixels[None])[0]
        assert len(alone) == count and np.allclose(alone.mean(0).numpy(), vector, atol=2e-5)


def test_the_command_compares_towers_and_caches(tower, photos, tmp_path, capsys):
    from llava_packing_tower.tools.demo.tiny_models import make_tower

    other = tmp_path / "other_packing"
    make_tower(other, seed=4)
    words = ["probe", str(tower), str(other), "--data", str(photos), "--cache", str(tmp_path / "cache"), "--k", "3"]
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "24 images of 3 classes, 6 held out" in out and out.count("images/s") == 2
    first = json.loads((tmp_path / "a.json").read_text())
    assert [entry["tower"] for entry in first] == [str(tower), str(other)]
    assert all(entry["linear"] > 0.6 and entry["tested"] == 6 for entry in first), first
    assert main([*words, "--json", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.count("features from the cache") == 2
    damaged = sorted((tmp_path / "cache").glob("*.npz"))
    for part in (9, 300):
        whole = [file.read_bytes() for file in damaged]
        for file, content in zip(damaged, whole):
            file.write_bytes(content[:-part])
        assert main(words) == 2
        assert re.search(r"\.npz: these cached features are damaged, remove them: .+\n$", capsys.readouterr().err)
        for file, content in zip(damaged, whole):
            file.write_bytes(content)
    second = json.loads((tmp_path / "b.json").read_text())
    assert [{**e, "seconds": 0} for e in first] == [{**e, "seconds": 0} for e in second]
    # Another layer, another image, other weights: nothing of the cache fits.
    for change in ("layer", "image", "weights"):
        more = ["--select_layer", "-2"] if change == "layer" else []
        if change == "image":
            Image.new("RGB", (70, 50)).save(photos / "dots" / "0.png")
        if change == "weights":
            make_tower(tower, seed=5)
            make_tower(other, seed=6)
        assert main([*words, *more]) == 0
        assert "from the cache" not in capsys.readouterr().out, change


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_familys_features_are_means_of_the_patches_alone(name, golden, photos):
    """No class token or register is in the mean, and no image sees its neighbours in the pass."""
    fixed = name == "aimv2_learned"
    if fixed:
        with pytest.raises(ValueError, match=r"images of one size only: add --square"):
            probe.load_tower(f"packing:{golden / name}")
    loaded = probe.load_tower(f"packing:{golden / name}", square=fixed, **({} if fixed else {"max_patches": 40}))
    assert type(loaded.vision_tower) is ALL_FAMILIES[name]
    files = probe.read_folder(photos).files[::4]
    together, counts = probe.features(loaded, files, batch_size=4)
    assert len(set(counts.tolist())) == 1 if fixed else len(set(counts.tolist())) > 2
    patch = loaded.config.patch_size
    for file, vector, count in zip(files, together, counts):
        pixels = loaded.image_processor.preprocess(Image.open(file), return_tensors="pt")["pixel_values"][0]
        assert count == (pixels.shape[1] // patch) * (pixels.shape[2] // patch)
        with torch.inference_mode():
            alone = loaded(pixels[None])[0]
        assert len(alone) == count and np.allclose(alone.float().mean(0).numpy(), vector, atol=2e-5)


def test_families_are_compared_in_one_table(golden, photos, tmp_path, capsys):
    names = [name for name in GOLDEN_FAMILIES if name != "aimv2_learned"]
    words = ["probe", *(f"packing:{golden / name}" for name in names), "--data", str(photos), "--max_patches", "40"]
    words += ["--k", "3", "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "all.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    configs = [json.loads((golden / name / "config.json").read_text()) for name in names]
    assert len({entry["family"] for entry in found}) == len(names) == 3
    assert [entry["hidden_size"] for entry in found] == [
        config.get("hidden_size") or config["vision_config"]["hidden_size"] for config in configs
    ]
    assert all(entry["tested"] == 6 and 0 < entry["patches"] <= 40 for entry in found)
    # The textures differ so much that random features tell them apart: chance is a third.
    assert all(entry["linear"] > 0.6 for entry in found), found
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 3
    assert capsys.readouterr().out.count("images/s") == 3


def test_labels_that_say_nothing_score_near_chance(tower, photos):
    """The probe does not see what it is tested on."""
    real = probe.read_folder(photos)
    noise = np.random.default_rng(1).normal(size=(240, 16)).astype(np.float32)
    labels, is_test = np.tile(real.labels, 10), np.tile(real.is_test, 10)
    linear, knn = probe.classify(noise, probe.Photos((), labels, CLASSES, is_test), k=5)
    assert linear < 0.55 and knn < 0.55


def test_wrong_words_are_refused_by_name(tower, photos, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    (tmp_path / "b" / "broken.png").write_bytes(b"no image")
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["probe", str(tower), "--data", str(tmp_path), *cache]) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/*")), "nothing half done is kept"
    assert main(["probe", str(tmp_path / "none"), "--data", str(photos), *cache]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["probe", str(tower), "--data", str(photos), "--square", "--max_patches", "9"]) == 2
    for option in ("--max_patches", "--k", "--batch_size"):
        assert (
            main(["probe", str(tower), "--data", str(photos), option, "0"]) == 2 and option in capsys.readouterr().err
        )
    assert main(["probe", str(tower), "--data", str(photos), "--square", "--k", "9999", *cache]) == 0
    assert "9999" not in capsys.readouterr().out  # there are not so many neighbors


def test_a_default_cache_that_cannot_be_written_is_said_before_the_work(tower, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").touch()
    monkeypatch.setattr(probe, "CACHE", tmp_path / "home" / "probe")
    monkeypatch.setattr(probe, "read_folder", lambda *_: pytest.fail("the work began"))
    assert main(["probe", str(tower), "--data", str(photos)]) == 2
    assert capsys.readouterr().err.startswith(f"llava-packing probe: --cache: {tmp_path}/home/probe cannot be written")
