from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from clips import write_video
from PIL import Image
from tiny.dual import build_clip
from tiny.models import draw_image
from tiny.videos import forward_by_hand, patches_by_hand

from vlm2vec import Embedder, UserError
from vlm2vec.types import EmbeddingInput

GOLDEN = Path(__file__).parents[1] / "golden"
FRAMES = [draw_image(64, 48, seed) for seed in range(4)]
STILL = draw_image(40, 70, 9)
FILM = [draw_image(64, 48, seed) for seed in range(7)]  # of which 0, 2, 4, 6 are taken
ASKED = {"video": FRAMES, "text": "what happens?"}
SMALL = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


def load(source: Path | str, **options: object) -> Embedder:
    return Embedder.from_pretrained(source, device="cpu", dtype=torch.float32, **options)


def assert_same(vectors: np.ndarray, expected: np.ndarray) -> None:
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999, cosines


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("scheme", ["text", "multimodal"])
def test_qwen_reads_a_video_as_patches_of_two_frames(family, scheme, tiny_vlm):
    frames = [draw_image(56, 84, seed) for seed in range(4)]
    pixels, grid = patches_by_hand(tiny_vlm(family), frames)
    prompt = "<|video_pad|>" * (2 * 2 * 3) + "\nwhat happens?\n"
    more = {"second_per_grid_ts": torch.tensor([2 / 24])} if family == "qwen2_5_vl" else {}  # 24 frames a second
    if scheme == "text":
        more = {"position_ids": torch.arange(len(prompt.replace("<|video_pad|>", "v"))).expand(3, 1, -1)}
    own = forward_by_hand(tiny_vlm(family), prompt, pixel_values_videos=pixels, video_grid_thw=grid, **more)
    model = load(tiny_vlm(family), positions=scheme)
    assert model.backbone.reads_videos
    assert_same(model.encode([{"video": frames, "text": "what happens?"}]), own)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "qwen4_exp"])
def test_qwen3_reads_the_time_before_every_two_frames(family, tiny_vlm, tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=10, codec="libx264", fps=10)
    model = load(tiny_vlm(family), num_frames=4)
    item = EmbeddingInput.of({"video": path, "text": "what happens?"})
    assert item.video.sample(4).indices == [0, 3, 6, 9]
    batch = model.backbone.process([item])
    vision = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    prompt = f"<{0.15:.1f} seconds>{vision}<{0.75:.1f} seconds>{vision}\nwhat happens?\n"
    assert model.backbone.processor.tokenizer.decode(batch["input_ids"][0]) == prompt
    frames = [frame.load().resize((64, 64), Image.Resampling.BICUBIC) for frame in item.video.sample(4).images]
    pixels, grid = patches_by_hand(tiny_vlm(family), frames)  # 48 rows are not a multiple of 32
    own = forward_by_hand(tiny_vlm(family), prompt, pixel_values_videos=pixels, video_grid_thw=grid)
    assert_same(model.encode([item]), own)


@torch.inference_mode()
def test_llava_onevision_pools_the_features_of_each_frame(tiny_vlm):
    folder = tiny_vlm("llava_onevision")
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    frames = [draw_image(28, 28, seed) for seed in range(3)]
    mean, std = (np.array(values)[:, None, None] for values in (images.image_mean, images.image_std))
    pixels = np.stack([(np.asarray(frame).transpose(2, 0, 1) / 255 - mean) / std for frame in [*frames, frames[-1]]])
    seen = torch.tensor(pixels, dtype=torch.float32)[None]
    prompt = "<video>" * (4 * 2 * 2 + 1) + "\nwhat happens?\n"  # four frames of 2 x 2 features, a newline
    own = forward_by_hand(folder, prompt, pixel_values_videos=seen)
    assert_same(load(folder, num_frames=4).encode([{"video": frames, "text": "what happens?"}]), own)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_vector_of_a_video_does_not_depend_on_its_batch_mates(family, side, tiny_vlm):
    model = load(tiny_vlm(family), num_frames=4, padding_side=side)
    values = [
        "dogs",
        ASKED,
        {"image": STILL},
        {"video": FILM[:3]},
        {"video": FILM, "images": [STILL], "text": "like <|image_1|>, <|video_1|>?"},
    ]
    alone = model.encode(values, batch_size=1)
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 0, 1]):
        with torch.inference_mode():
            batch = model.backbone.process([EmbeddingInput.of(values[i]) for i in order])
            assert_same(model(batch).numpy(), alone[order])
            assert_same(torch.cat([model(part) for part in batch.split(2)]).numpy(), alone[order])


def other(name: str, tiny_vlm, tmp_path: Path) -> Embedder:
    if name == "clip":
        build_clip(tmp_path)
        return load(tmp_path, num_frames=4)
    if name == "compact":
        model = load("compact", **SMALL)
        model.backbone.num_frames = 4
        return model
    return load(GOLDEN / "phi3v" if name == "phi3_v" else tiny_vlm(name), num_frames=4)


@pytest.mark.parametrize("name", ["llava", "idefics3", "mllama", "phi3_v", "clip", "compact"])
def test_a_family_without_videos_sees_the_frames_as_images(name, tiny_vlm, tmp_path):
    model = other(name, tiny_vlm, tmp_path)
    assert not model.backbone.reads_videos
    taken = [FILM[i] for i in (0, 2, 4, 6)]
    pairs = [
        (
            {"video": FILM, "text": "what?", "instruction": "Find."},
            {"images": taken, "text": "what?", "instruction": "Find."},
        ),
        ({"video": FILM}, {"images": taken}),
        (
            {"video": FILM, "image": STILL, "text": "<|image_1|> in <|video_1|>"},
            {"images": [STILL, *taken], "text": "<|image_1|> in <|image_2|><|image_3|><|image_4|><|image_5|>"},
        ),
    ]
    pairs = pairs[:2] if name == "clip" else pairs  # it reads no placeholders
    seen, same = (model.backbone.process([EmbeddingInput.of(pair[k]) for pair in pairs]) for k in (0, 1))
    assert set(seen.tensors) == set(same.tensors) and len(seen) == len(pairs)
    assert all(torch.equal(seen[name], same[name]) for name in seen.tensors)


def test_how_a_video_is_read_is_part_of_the_checkpoint(tiny_vlm, tmp_path):
    native = load(tiny_vlm("qwen2_vl"))
    as_images = load(tiny_vlm("qwen2_vl"), video="images", num_frames=3)
    deprecated = load(tiny_vlm("qwen2_vl"), video="pictures", num_frames=3).backbone
    assert not deprecated.reads_videos and deprecated.options()["video"] == "images"
    long = {"video": FILM, "text": "what?"}
    same = as_images.encode([{"images": [FILM[0], FILM[3], FILM[6]], "text": "what?"}])
    np.testing.assert_allclose(as_images.encode([long]), same, atol=1e-6)
    assert (native.encode([long]) * same).sum() < 0.9999
    again = load(as_images.save_pretrained(tmp_path / "saved"))
    np.testing.assert_allclose(again.encode([long]), same, atol=1e-6)
    np.testing.assert_allclose(
        load(native.save_pretrained(tmp_path / "n")).encode([long]), native.encode([long]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"video": FRAMES, "image": STILL, "text": "see <|image_1|>"}, r"expected <\|video_1\|> exactly once"),
        ({"video": FRAMES, "text": "<|video_1|><|video_1|>"}, r"expected <\|video_1\|> exactly once"),
        ({"video": FRAMES, "text": "<|video_1|> <|image_1|>"}, r"one <\|image_k\|> for each image"),
        ({"text": "<|video_1|>"}, r"<\|video_1\|> but the input has no video"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_video_that_is_not_where_the_text_says_is_one_clear_line(family, value, words, tiny_vlm):
    with pytest.raises(UserError, match=words) as caught:
        load(tiny_vlm(family)).encode([value])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"num_frames": "all"}, {"video": "no"}])
def test_an_unknown_way_to_read_videos_is_one_clear_line(options, tiny_vlm):
    with pytest.raises(UserError, match=next(iter(options))):
        load(tiny_vlm("llava"), **options)
