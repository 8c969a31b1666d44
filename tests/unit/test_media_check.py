"""The files of a dataset before training: what cannot be read is listed, or refused; some headers, or every file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from native_data_checks import turns, write_video
from PIL import Image

from llava_packing_tower.data.images import ImageReading
from llava_packing_tower.data.media_check import MediaCheck, check_data


def write(folder: Path, entries: list[dict]) -> Path:
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.fixture
def photos(tmp_path):
    """Six photos; one is missing, one is truncated behind its header, one a pipe. Samples a to f."""
    noise = Image.effect_noise((60, 40), 90)
    for name in "abcdef":
        noise.save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").unlink()
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes()[:900])
    (tmp_path / "e.png").unlink()
    os.mkfifo(tmp_path / "e.png")
    entries = [{"id": n, "image": f"{n}.png", "conversations": turns("<image>q")} for n in "abcdef"]
    return write(tmp_path, entries)


def looked(tmp_path, file, **options) -> MediaCheck:
    media = MediaCheck({"image": str(tmp_path)}, False, **options)
    check_data(str(file), media)
    return media


def test_what_cannot_be_read_is_listed_and_left_out(tmp_path, photos):
    media = looked(tmp_path, photos)
    lines = media.lines()
    assert (
        lines[0].startswith("2 of 6 files cannot be read: their samples are left out") and "--check_images" in lines[0]
    )
    assert lines[1] == f"  sample b: {tmp_path}/b.png: No such file or directory"
    assert lines[2] == f"  sample e: {tmp_path}/e.png is not a regular file"


def test_every_file_is_read_to_its_end_in_parallel_with_progress(tmp_path, photos):
    seen = []
    media = looked(tmp_path, photos, all_of_it=True, progress=lambda done, count: seen.append((done, count)))
    assert [line.split(":")[0] for line in media.lines()[1:]] == ["  sample b", "  sample d", "  sample e"]
    assert seen == [(n, 6) for n in range(1, 7)] and media.looked_at == 6
    assert not any("more" in line for line in media.lines())


def test_strict_refuses_one_and_most_are_always_refused(tmp_path, photos):
    with pytest.raises(ValueError, match="2 files of the data cannot be read:\n  sample b: "):
        looked(tmp_path, photos, strict=True)
    for name in "ac":
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ValueError, match="4 files of the data cannot be read:\n  sample a: "):
        looked(tmp_path, photos)
    (tmp_path / "f.png").unlink()
    with pytest.raises(ValueError, match="sample f: ") as error:  # what was asked for is the whole list
        looked(tmp_path, photos, all_of_it=True)
    assert str(error.value).count("sample") == 6 and "more" not in str(error.value)


def test_headers_tell_what_is_too_large_or_too_long(tmp_path, photos):
    media = MediaCheck({"image": str(tmp_path)}, False, ImageReading(max_pixels=100))
    with pytest.raises(ValueError, match=r"sample a: .*a\.png .*60 x 40 pixels, more than mm_packing_max_pixels 100"):
        check_data(str(photos), media)
    long = looked(tmp_path, photos, reading=ImageReading(max_aspect=2), native=True)
    assert len(long.unreadable) == 2
    with pytest.raises(ValueError, match="longer than mm_packing_max_aspect 1"):
        looked(tmp_path, photos, reading=ImageReading(max_aspect=1), native=True)


def test_videos_are_read_too(tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "a.mp4", 5)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(b"no frame")
    names = ("a.mp4", "a.mp4", "a.mp4", "b.mp4", "empty", "frames")
    entries = [{"id": n, "video": n, "conversations": turns("<image>q")} for n in names]
    media = MediaCheck({"video": str(tmp_path)}, True, all_of_it=True)
    check_data(str(write(tmp_path, entries)), media)
    assert [line.split(":")[0] for line in media.unreadable] == ["sample b.mp4", "sample empty", "sample frames"]


def test_files_without_a_folder_are_refused():
    """LLaVA joins the name with no folder, absolute or not."""
    none = MediaCheck({"image": None, "video": None}, reads_videos=True)
    none.look([{"conversations": []}])
    for kind in ("image", "video"):
        with pytest.raises(
            ValueError, match=rf"^{kind}_folder is missing \(/ for absolute names\), and sample 7 has '/a"
        ):
            none.look([{"conversations": []}, {"id": 7, kind: "/a.file"}])
