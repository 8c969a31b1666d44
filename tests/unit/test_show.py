"""`llava-packing show`: the numbers are those of the tower, the picture has what it should."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import TINY, tiny
from PIL import Image

from llava_packing_tower.cli.main import main
from llava_packing_tower.models.encoder import PackedEncoder
from llava_packing_tower.multimodal.visual_inputs import Visual
from llava_packing_tower.multimodal.visual_tokens import TokenLayout, encode_visuals
from llava_packing_tower.tools.show import look, picture

av = pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture
def folder(tmp_path):
    model = tiny("llava_vit")
    model.save_pretrained(tmp_path / "tower_packing")
    left = np.zeros((24, 40, 3), np.uint8)
    left[:, 20:] = (250, 120, 10)
    Image.fromarray(left).save(tmp_path / "halves.png")
    Image.fromarray(np.full((13, 30, 3), 90, np.uint8)).save(tmp_path / "gray.png")
    return tmp_path


def write_video(file, frames=9, size=(64, 48)):
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            image = np.full((size[1], size[0], 3), 25 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def show(folder, *words):
    numbers = folder / "numbers.json"
    status = main(["show", *words, "--tower", str(folder / "tower_packing"), "--json", str(numbers)])
    return status, json.loads(numbers.read_text()) if status == 0 else None


def test_numbers_and_text(folder, capsys):
    status, found = show(folder, str(folder / "halves.png"), str(folder / "gray.png"), "--max_patches", "100")
    text = capsys.readouterr().out
    assert status == 0
    first, second = found["images"]
    assert (first["size"], first["resized"], first["grid"], first["tokens"]) == (
        [40, 24],
        [40, 24],
        [1, 6, 10],
        [1, 6, 10],
    )
    assert second["size"] == [30, 13] and second["grid"] == [1, 3, 8] and second["resized"] == [32, 12]
    assert found["patches"] == 84 and found["measured_seconds"] is None
    width, inner, layers = 64, 96, 2
    linear = 2 * layers * 84 * (4 * width**2 + 2 * width * inner)
    assert found["flops"] == linear + layers * 4 * width * (60**2 + 24**2)
    assert found["weight_bytes"] == 4 * sum(p.numel() for p in tiny("llava_vit").parameters())
    assert found["activation_bytes"] == 84 * (6 * width + 2 * inner) * 4
    assert "0: " in text and "40 x 24 pixels, 1 x 6 x 10 = 60 patches, 60 tokens" in text
    rows = [line for line in text.splitlines() if line and set(line) <= set(picture.SHADES)]
    assert len(rows) == 6 + 3 and rows[0][:10] == " " * 10 and set(rows[0][10:]) == {rows[0][-1]} != {" "}
    assert "|" in text and "one pass of 84 patches in 2 segments" in text


def test_tokens_behind_a_merging_projector(folder):
    _, found = show(folder, str(folder / "halves.png"), "--projector", "spatial_merge", "--max_patches", "100")
    assert found["images"][0]["tokens"] == [1, 3, 5]


def test_the_picture_and_its_features(folder, capsys):
    out = folder / "seen.png"
    words = [
        str(folder / "halves.png"),
        str(folder / "gray.png"),
        "--features",
        "--out",
        str(out),
        "--max_patches",
        "100",
    ]
    status, found = show(folder, *words)
    assert status == 0 and found["measured_seconds"] > 0 and found["measured_bytes"] > 0
    image = Image.open(out)
    assert image.width == 2 * (picture.WIDTH + picture.MARGIN) + picture.MARGIN
    pixels = np.asarray(image).reshape(-1, 3)
    assert {picture.COLORS[0], picture.COLORS[1]} <= {tuple(p) for p in pixels.tolist()}  # the segments
    assert f"written to {out}" in capsys.readouterr().out
    tower = look.load(str(folder / "tower_packing"), "linear", 100, "cpu")
    seen = [look.see(tower, folder / name, 8) for name in ("halves.png", "gray.png")]
    look.run(tower, seen, look.cost_of(tower, seen))
    with torch.inference_mode():
        expected = tower([each.values[0] for each in seen])
    assert all(np.array_equal(a.features, b.numpy()) for a, b in zip(seen, expected))
    colors = look.principal_colors(seen)
    assert [c.shape for c in colors] == [(1, 6, 10, 3), (1, 3, 8, 3)]
    assert np.abs(colors[0][0, :, :5].mean(0) - colors[0][0, :, 5:].mean(0)).max() > 30  # the halves differ


def test_a_video_has_its_frames_and_positions(folder, capsys):
    write_video(folder / "clip.mp4")
    words = [str(folder / "clip.mp4"), "--frames", "4", "--features", "--out", str(folder / "clip.png")]
    status, found = show(folder, *words)
    (clip,) = found["images"]
    assert status == 0 and clip["grid"] == [4, *clip["grid"][1:]]
    assert clip["frame_indices"] == [0, 2, 5, 8] and clip["positions"] == [0, 16, 39, 63]
    assert "frames and their positions: 0 at 0, 2 at 16, 5 at 39, 8 at 63" in capsys.readouterr().out
    assert Image.open(folder / "clip.png").width == 8 * (picture.WIDTH + picture.MARGIN) + picture.MARGIN


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_shown_as_it_is_run(name, folder, monkeypatch):
    """Segments are those of the encoder (the largest, without prefix tokens), features those of the clip's frames."""
    tiny(name).save_pretrained(folder / "tower_packing")
    write_video(folder / "clip.mp4")
    tower = look.load(str(folder / "tower_packing"), "linear", 40, "cpu")
    model = tower.vision_tower
    seen = [look.see(tower, folder / file, 5) for file in ("halves.png", "clip.mp4")]
    ran, forward = [], PackedEncoder.forward

    def spied(self, hidden_states, segments, *rest):
        kinds = getattr(segments, "kinds", (segments,))
        ran.append((len(hidden_states), max(kinds, key=lambda kind: kind.max_seqlen).lengths))
        return forward(self, hidden_states, segments, *rest)

    monkeypatch.setattr(PackedEncoder, "forward", spied)
    look.run(tower, seen, look.cost_of(tower, seen))
    ((tokens, lengths),) = ran
    shown = [length for each in seen for length in each.segments]
    assert sum(shown) == sum(each.patches for each in seen)
    prefix = (tokens - sum(shown)) // len(lengths)
    assert sorted(length - prefix for length in lengths) == sorted(shown)  # (a tower takes the longest first)
    clip = seen[1]
    if model.image_only:
        assert clip.grid[0] == 5
        return
    assert clip.grid[0] == -(-5 // model.frames_per_patch)
    assert clip.positions.tolist() == ([0, 16, 32, 47, 63] if model.stretches_clips else [0, 2, 4, 6, 8])
    layout = TokenLayout(clips=True, pool_stride=1)
    visual = Visual(clip.values, True, frame_indices=(0, 2, 4, 6, 8), total_frames=9)
    with torch.inference_mode():
        (expected,) = encode_visuals(tower, torch.nn.Identity(), [visual], layout)
    assert np.allclose(clip.features, expected.numpy(), atol=1e-5)


def test_kept_patches_stand_on_their_frames(folder):
    """24 kept patches of three frames of 3 x 4 in an image of 4 x 6: gray values 0, 10, ... 230, in their order."""
    frames = np.repeat([0, 3, 7], 8)
    places = np.stack([frames, np.tile([0, 0, 1, 1, 1, 2, 2, 2], 3), np.tile([1, 3, 0, 1, 2, 0, 1, 3], 3)], 1)
    np.save(folder / "kept.npy", places.astype(np.float32))
    kept = (np.arange(24, dtype=np.uint8) * 10).reshape(4, 6).repeat(4, 0).repeat(4, 1)
    Image.fromarray(np.stack([kept] * 3, -1)).save(folder / "kept.png")
    tower = look.load(str(folder / "tower_packing"), "linear", 24, "cpu")
    seen = look.see(tower, folder / "kept.png", 8)
    look.place_patches(seen, folder / "kept.npy")
    pictures = picture.kept_on_frames(seen, 4)
    assert [title for title, _ in pictures] == [f"frame {n}: 8 patches kept" for n in (0, 3, 7)]
    first, second, _ = (np.asarray(image) for _, image in pictures)
    assert first.shape == (12, 16, 3) and first[0, 4, 0] == 0 and first[4, 8, 0] == 40 and first[11, 15, 0] == 70
    assert tuple(first[0, 0]) == picture.GRAY and second[0, 4, 0] == 80
    look.run(tower, [seen], look.cost_of(tower, [seen]))
    plain = look.see(tower, folder / "kept.png", 8)
    look.run(tower, [plain], look.cost_of(tower, [plain]))
    assert np.abs(plain.features - seen.features).max() > 1e-4  # the positions reach the tower
    np.save(folder / "kept.npy", places[:-1])
    with pytest.raises(ValueError, match=r"kept\.npy has 23 positions, .*kept\.png has 24 patches"):
        look.place_patches(plain, folder / "kept.npy")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["--frames", "0"], "--frames and --max_patches must be at least 1"),
        (["--projector", "foo"], "--projector: 'foo' is unknown"),
        (["halves.png", "--positions", "x.npy"], "--positions belongs to one image"),
    ],
)
def test_what_cannot_be_shown(folder, capsys, words, said):
    assert (
        show(folder, str(folder / "gray.png"), *(str(folder / w) if w.endswith(("png", "npy")) else w for w in words))[
            0
        ]
        == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def seen_of(name, pixels, patch=4, segments=1):
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    grid = (1, rows, columns)
    lengths = [rows * columns // segments] * segments
    return look.Seen(name, pixels.shape[1::-1], pixels[None], torch.zeros(1), grid, grid, lengths)


def test_lines_between_patches_are_seen_on_white_pages_too():
    page = np.full((12, 20, 3), 255, np.uint8)
    page[:, 12:] = 0
    found = np.asarray(picture.with_grid(page, 4)).astype(int)
    assert np.abs(found[4, :12] - 255).min() > 100 and found[4, 12:].min() == 255
    assert (found[1, 1] == 255).all() and (found[1, 13] == 0).all()


def test_every_word_of_the_picture_is_in_it(tmp_path, monkeypatch):
    """One small image and the line of its cost, a long name, many short segments: nothing is cut off or overprinted."""
    drawn = []
    monkeypatch.setattr(picture.ImageDraw.ImageDraw, "text", lambda pen, at, text, **_: drawn.append((at, text)))
    font = picture.ImageFont.load_default()
    images = [seen_of(f"/{'deep/' * 30}a\nb.png", np.zeros((40, 40, 3), np.uint8), segments=100)]
    picture.draw(tmp_path / "a.png", images, 4, ["word " * 40], None)
    width = Image.open(tmp_path / "a.png").width
    assert all(at[0] + font.getlength(text.strip()) <= width for at, text in drawn)
    assert any(text.startswith("0: ...eep/deep/") and "a\\nb.png, 40 x 40 pixels" in text for _, text in drawn)
    borders = sorted((at[0], int(text)) for at, text in drawn if text.isdigit())
    ends = [at + font.getlength(str(number)) for at, number in borders]
    assert borders[0][1] == 0 and borders[-1][1] == 100
    assert all(end < at for end, (at, _) in zip(ends, borders[1:]))


def test_a_picture_of_many_images_is_bounded(tmp_path, monkeypatch):
    """All of them are in the packed row."""
    drawn = []
    monkeypatch.setattr(picture.ImageDraw.ImageDraw, "text", lambda pen, at, text, **_: drawn.append(text))
    heights = {}
    for count in (picture.DRAWN - 1, picture.DRAWN, picture.DRAWN + 30):
        drawn.clear()
        images = [seen_of(f"{number}.png", np.zeros((8, 8, 3), np.uint8)) for number in range(count)]
        picture.draw(tmp_path / "a.png", images, 4, ["costs"], None)
        heights[count] = Image.open(tmp_path / "a.png").height
        assert sum(": " in text for text in drawn) - 1 == min(count, picture.DRAWN)
        assert any(text.startswith(f"one packed row of {sum(seen.patches for seen in images)} ") for text in drawn)
    one, most, more = heights.values()
    assert one < most < more < most + 30 and f"the first {picture.DRAWN} of {count} images are drawn" in drawn


def test_the_text_picture_is_as_wide_as_the_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "16")
    status, _ = show(folder, str(folder / "halves.png"), str(folder / "gray.png"), "--max_patches", "100")
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if line and set(line) <= {*picture.SHADES, "|", "-", "0", "1"}]
    assert status == 0 and len(drawn) > 4 and max(map(len, drawn)) == 16


def test_positions_far_out_and_pictures_of_other_kinds_are_refused(folder, capsys):
    places = np.zeros((60, 3), np.float32)
    places[7] = (3, 1e30, 5)
    np.save(folder / "places.npy", places)
    words = [str(folder / "halves.png"), "--max_patches", "100", "--positions", str(folder / "places.npy")]
    assert show(folder, *words)[0] == 2
    assert "places.npy: its frames have 65537 x 6 patches or more, at most 65536" in capsys.readouterr().err
    assert show(folder, str(folder / "halves.png"), "--out", str(folder / "a.jpg"))[0] == 2
    assert "a.jpg: the picture is a PNG" in capsys.readouterr().err
