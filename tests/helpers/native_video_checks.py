"""Videos at native resolution inside a real host; run by ``native_checks.py``. The plain reference is written here."""

from __future__ import annotations

import math
import sys

import torch
from native_host import IMAGE, Host, close, collate, pixels
from torch.nn import functional


def video(frames, h, w, seed=7):
    return torch.stack(pixels(*[(h, w)] * frames, seed=seed))


def details(*kinds):
    """What stands in ``image_sizes``: hosts without modalities learn there what is a video."""
    return [{"modality": kind} for kind in kinds]


def make_batch(samples, images, kinds, side="right", more=()):
    batch = collate(samples, images, side)
    batch["modalities"] = list(kinds)
    batch["image_sizes"] = details(*kinds)
    for index, extra in more:
        batch["image_sizes"][index].update(extra)
    return batch


def encode_alone(model, frames, positions=None):
    """``[T, C, H, W]`` through the tower by hand, in one sequence if there are positions, else frame by frame."""
    from llava_packing_tower import image_to_packing_input

    inner = model.get_vision_tower().vision_tower
    if positions is None:
        parts = [image_to_packing_input(frame, 14) for frame in frames]
        return torch.cat([inner(*part, output_hidden_states=True).hidden_states[-1] for part in parts])
    rows, grid = image_to_packing_input(frames.transpose(0, 1), 14)
    return inner(rows, grid, patch_positions=positions, output_hidden_states=True).hidden_states[-1]


def positions_at(indices, h, w):
    return torch.tensor([[t, y, x] for t in indices for y in range(h) for x in range(w)])


def pooled(tokens, t, h, w, mode, stride):
    """Frame by frame on the real grid; averages and maxima by loops."""
    if stride == 1:
        return tokens.view(t, h, w, -1)
    frames = tokens.view(t, h, w, -1)
    if mode == "bilinear":
        size = (math.ceil(h / stride), math.ceil(w / stride))
        return functional.interpolate(frames.permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)
    reduce = (lambda block: block.mean(0)) if mode == "average" else (lambda block: block.amax(0))
    down, across = min(stride, h), min(stride, w)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            reduce(frame[y * down : (y + 1) * down, x * across : (x + 1) * across].flatten(0, 1))
                            for x in range(w // across)
                        ]
                    )
                    for y in range(h // down)
                ]
            )
            for frame in frames
        ]
    )


def with_newlines(frames, newline, position):
    lines = []
    for frame in frames:
        for row in frame:
            lines += [row, newline] if position == "grid" else [row]
        lines += [newline] if position == "frame" else []
    lines += [newline] if position == "one_token" else []
    return torch.cat(lines)


def clip_features_are_interpolated_and_differ_from_frames(host: Host):
    from llava_packing_tower import interpolate_frame_indices

    t, h, w = 5, 3, 4
    frames, samples = video(t, h, w), [[3, IMAGE, 4]]
    found = {}
    for mode in ("clip", "frames"):
        model = host.model(mm_packing_video=mode)
        embeddings = host.prepare(model, make_batch(samples, [frames], ["video"]))[4][0, 1:-1]
        places = interpolate_frame_indices(torch.arange(t)[None], torch.tensor([t]))[0].tolist()
        assert places == [0, 16, 32, 47, 63]
        states = encode_alone(model, frames, positions_at(places, h, w) if mode == "clip" else None)
        tokens = model.get_model().mm_projector(states)
        close(embeddings, pooled(tokens, t, h, w, "bilinear", 2).flatten(0, 2))
        found[mode] = embeddings
        # Frame order: with "clip" each frame's features depend on where it stands; alone they only move.
        turned = host.prepare(model, make_batch(samples, [frames.flip(0)], ["video"]))[4][0, 1:-1]
        same = (turned.view(t, -1).flip(0) - embeddings.view(t, -1)).abs().max().item()
        assert same < 2e-5 if mode == "frames" else same > 1e-3, (mode, same)
    assert (found["clip"] - found["frames"]).abs().max() > 1e-2


def frames_stand_where_they_lie_in_their_video(host: Host):
    model = host.model(mm_packing_video="clip", mm_spatial_pool_stride=1)
    frames = video(3, 2, 3)
    given = {"frame_indices": torch.tensor([0, 10, 30]), "total_frames": 64}
    batch = make_batch([[IMAGE, 4]], [frames], ["video"], more=[(0, given)])
    tokens = model.get_model().mm_projector(encode_alone(model, frames, positions_at([0, 10, 30], 2, 3)))
    close(host.prepare(model, batch)[4][0, :-1], tokens)


def pooling_and_newlines_on_the_real_grid(host: Host):
    t, h, w = 3, 3, 5
    frames = video(t, h, w)
    for merge in ("spatial_unpad", "spatial", "flat"):
        for mode, stride in (("average", 2), ("max", 2), ("bilinear", 2), ("average", 4), ("bilinear", 3), ("max", 1)):
            for position in ("grid", "frame", "one_token", "no_token"):
                options = {"mm_patch_merge_type": merge, "mm_newline_position": position}
                model = host.model(
                    mm_packing_video="frames", mm_spatial_pool_mode=mode, mm_spatial_pool_stride=stride, **options
                )
                embeddings = host.prepare(model, make_batch([[IMAGE, 4]], [frames], ["video"]))[4][0, :-1]
                tokens = model.get_model().mm_projector(encode_alone(model, frames))
                newline = model.get_model().image_newline[None] if merge == "spatial_unpad" else None
                where = position if merge == "spatial_unpad" else "no_token"
                close(embeddings, with_newlines(pooled(tokens, t, h, w, mode, stride), newline, where))
                host.kept.clear()


def square_frames_are_bit_equal_to_the_hosts_own_path(host: Host):
    if not host.is_next:
        return  # LLaVA 1.x knows no videos
    frames = [video(3, 4, 4), video(1, 4, 4, seed=8)]
    samples = [[IMAGE, 3], [5, 6], [7, IMAGE, IMAGE, 4]]
    images = [frames[0], pixels((4, 4))[0], frames[1], pixels((4, 4), seed=9)[0]]
    kinds = ["video", "text", "video", "image"]
    for merge in ("flat", "spatial_unpad"):
        for mode in ("average", "max", "bilinear"):
            for position in ("grid", "frame", "one_token", "no_token"):
                if merge == "spatial_unpad":
                    samples, images, kinds = [[IMAGE, 3], [7, IMAGE, 4]], frames, ["video", "video"]
                options = {
                    "mm_patch_merge_type": merge,
                    "mm_newline_position": position,
                    "mm_spatial_pool_mode": mode,
                    "add_faster_video": False,
                }
                batch = {**collate(samples, images), "modalities": kinds}
                native, square = (host.model(r, mm_packing_video="frames", **options) for r in ("native", "square"))
                for a, b in zip(host.prepare(native, batch), host.prepare(square, batch)):
                    assert (a is None and b is None) or torch.equal(a, b), (merge, mode, position)
                assert torch.equal(host.forward(native, batch).logits, host.forward(square, batch).logits)
                host.kept.clear()


def images_and_videos_in_one_batch_in_one_pass(host: Host):
    for kind in ("mlp2x_gelu", "spatial_merge"):
        model = host.model(mm_projector_type=kind, mm_patch_merge_type="spatial_unpad", mm_newline_position="frame")
        samples = [[3, IMAGE, 4], [5, 6], [7, IMAGE, 8, IMAGE], [IMAGE, 9]]
        images = [video(4, 3, 2), pixels((1, 1))[0], pixels((2, 5))[0], video(2, 5, 3), video(1, 2, 2)]
        kinds = ["video", "text", "image", "video", "video"]
        calls = []
        model.get_vision_tower().vision_tower.encoder.layers[0].register_forward_hook(
            lambda module, inputs, output, calls=calls: calls.append(output[0].shape[0])
        )
        _, _, mask, _, embeddings, labels = host.prepare(model, make_batch(samples, images, kinds))[:6]
        assert calls == [24 + 1 + 10 + 30 + 4]
        starts = [0, 1, 2, 4]
        for row, (sample, start) in enumerate(zip(samples, starts)):
            count = max(sample.count(IMAGE), 1)
            batch = make_batch([sample], images[start : start + count], kinds[start : start + count])
            alone = host.prepare(model, batch)
            n = alone[4].shape[1]
            close(embeddings[row, :n], alone[4][0])
            assert torch.equal(labels[row, :n], alone[5][0]) and mask[row].sum() == n


def positions_of_a_sample_are_used(host: Host):
    """Two mosaics of one size, each with its own ``<image>``, are one clip; "frames" keeps them apart."""
    generator = torch.Generator().manual_seed(2)
    positions = torch.randint(0, 60, (2 * 6, 3), generator=generator)
    mosaics = pixels((2, 3), (2, 3), seed=6)
    samples = [[3, IMAGE, IMAGE, 4], [IMAGE, 5]]
    images = [*mosaics, pixels((1, 2))[0]]
    for mode in ("clip", "frames"):
        model = host.model(mm_packing_video=mode)
        more = [(i, {"patch_positions": p, "group": 9}) for i, p in enumerate(positions.split(6))]
        batch = make_batch(samples, images, ["image"] * 3, more=more)
        found = host.prepare(model, batch)[4][0, 1:13]
        if mode == "clip":
            states = encode_alone(model, torch.stack(mosaics), positions)
        else:
            states = torch.cat([encode_alone(model, m[None], p) for m, p in zip(mosaics, positions.split(6))])
        close(found, model.get_model().mm_projector(states))
    try:
        host.prepare(model, make_batch(samples, images, ["image"] * 3, more=[(0, {"patch_positions": positions})]))
    except ValueError as error:
        assert "[12, 3] for 1 x 2 x 3 = 6 patches" in str(error)
    else:
        raise AssertionError("positions of another number of patches")


def generate_about_videos(host: Host):
    """One prompt with a video and an image, one with a video of one frame: together as alone."""
    model = host.model()
    model.generation_config.eos_token_id = None
    model.config.tokenizer_padding_side = "right"  # as training leaves it
    samples = [[1, IMAGE, 4, IMAGE], [1, 8, IMAGE, 9, 10]]
    images, kinds = [video(3, 3, 2), pixels((2, 5))[0], video(1, 4, 3)], ["video", "image", "video"]

    def answers(samples, images, kinds, beams):
        batch = make_batch(samples, images, kinds, "left")
        more = {"modalities": batch["modalities"]} if host.is_next else {}
        return model.generate(
            batch["input_ids"],
            images=images,
            image_sizes=batch["image_sizes"],
            attention_mask=batch["attention_mask"].long(),
            do_sample=False,
            max_new_tokens=5,
            pad_token_id=0,
            num_beams=beams,
            **more,
        ).tolist()

    for beams in (1, 2):
        together = answers(samples, images, kinds, beams)
        alone = answers(samples[:1], images[:2], kinds[:2], beams) + answers(samples[1:], images[2:], kinds[2:], beams)
        assert together == alone and together[0] != together[1]


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
