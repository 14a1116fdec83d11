from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny.models import FAMILIES, draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models import st_folder
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification import fingerprint
from vlm2vec.models.vision import resolution
from vlm2vec.types import EmbeddingInput

GOLDEN = Path(__file__).parents[1] / "golden"
PHOTO = draw_image(1600, 1200, 1)
INPUTS = [{"image": draw_image(300, 200, 1)}, {"image": draw_image(90, 200, 2), "text": "a dog"}, "dogs"]
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def load(folder: Path, **options: object) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32, **options)


def told(processor: object, side: int) -> object:
    """A processor of the published size, with what it is told for this side."""
    return type(processor)(**{**processor.to_dict(), **resolution.image_settings(processor, side)})


def pixels_of(processor: object, side: int, **more: object) -> int:
    """Pixels that the model sees of a photograph."""
    output = told(processor, side)(PHOTO, return_tensors="pt", **more)
    if "image_grid_thw" in output:
        return int(output["image_grid_thw"].prod()) * processor.patch_size**2
    return output["pixel_values"].numel() // 3


PROCESSORS = {
    "qwen": (transformers.Qwen2VLImageProcessorPil(), {}, [336**2, 672**2, 1344**2]),
    "qwen3": (transformers.Qwen2VLImageProcessorPil(patch_size=16), {}, [336**2, 672**2, 1344**2]),
    "llava-next": (
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=GRID
        ),
        {},
        [2 * 336**2, 5 * 336**2, 5 * 336**2],  # the whole and its tiles
    ),
    "internvl": (
        transformers.GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, max_patches=12),
        {"crop_to_patches": True},
        [448**2, 448**2, 7 * 448**2],
    ),
    "idefics3": (
        transformers.Idefics3ImageProcessorPil(size={"longest_edge": 1456}, max_image_size={"longest_edge": 364}),
        {},
        [364**2, 364**2, 10 * 364**2],
    ),
    "pixtral": (
        transformers.PixtralImageProcessorPil(),
        {"patch_size": 28},
        [336 * 252, 672 * 504, 1344 * 1008],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_named_size_bounds_the_pixels_that_a_model_sees_of_a_photograph(name):
    processor, more, expected = PROCESSORS[name]
    seen = [pixels_of(processor, side, **more) for side in (336, 672, 1344)]
    for found, bound in zip(seen, expected, strict=True):
        assert 0.8 * bound <= found <= bound, seen
    assert seen == sorted(seen) and seen[0] < seen[2]
    again = told(told(processor, 672), 672).to_dict()
    assert again == told(processor, 672).to_dict()  # a checkpoint is told each time that it is loaded


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl"])
def test_a_bound_is_part_of_the_checkpoint_and_gives_the_same_vectors_in_any_batch(family, tiny_vlm, tmp_path):
    usual, small = load(tiny_vlm(family)), load(tiny_vlm(family), max_pixels=1600)
    lengths = [len(m.backbone.process([EmbeddingInput.of(INPUTS[0])])["input_ids"][0]) for m in (small, usual)]
    assert lengths[0] < lengths[1]
    alone = small.encode(INPUTS, batch_size=1)
    assert (small.encode(INPUTS) * alone).sum(axis=1).min() >= 0.99999
    assert (usual.encode(INPUTS[:1]) * alone[:1]).sum() < 0.9999
    again = load(small.save_pretrained(tmp_path / "saved"))
    np.testing.assert_allclose(again.encode(INPUTS), alone, atol=1e-6)
    assert again.backbone.options()["max_pixels"] == 1600
    for name in ("embedder.json", "modules.json"):  # what is left is a model of transformers
        (tmp_path / "saved" / name).unlink()
    processor = load(tmp_path / "saved")
    np.testing.assert_allclose(processor.encode(INPUTS), alone, atol=1e-6)


def test_an_adapter_of_a_model_with_other_tiles_is_not_left_to_sentence_transformers(tiny_vlm, tmp_path):
    small = load(tiny_vlm("llava_next"), max_pixels=1600)
    checkpoint.add_adapter(small.backbone, 2, 4, 0.0, None)
    expected = small.encode(INPUTS)
    small.save_pretrained(tmp_path / "adapter")
    assert st_folder.OWN_MODULE in (tmp_path / "adapter/modules.json").read_text()
    np.testing.assert_allclose(load(tmp_path / "adapter").encode(INPUTS), expected, atol=1e-6)


def test_named_sizes_reach_the_processor_and_the_fingerprint(tiny_vlm, tmp_path):
    low, high = (load(tiny_vlm("qwen2_vl"), resolution=name) for name in ("low", "high"))
    assert low.backbone.processor.image_processor.size["longest_edge"] == 336**2
    assert high.backbone.processor.image_processor.size["longest_edge"] == 1344**2
    assert "resolution low" in fingerprint.resolution(low.backbone)
    again = load(low.save_pretrained(tmp_path / "low"))
    assert again.backbone.options()["resolution"] == "low"
    wider = load(tmp_path / "low", resolution="mid")
    assert wider.backbone.processor.image_processor.size["longest_edge"] == 672**2
    bounded = load(tmp_path / "low", max_pixels=28 * 280)  # what is said now replaces what was saved
    assert bounded.backbone.options() == {"positions": "vision-start", "max_pixels": 28 * 280}


def test_a_name_replaces_the_bounds_of_a_known_checkpoint(tiny_vlm):
    known = load(tiny_vlm("qwen2_vl"), like="VLM2Vec/VLM2Vec-V2.0", resolution="mid")
    assert known.backbone.options() == {"positions": "text", "resolution": "mid"}


@pytest.mark.parametrize(("name", "crops"), [("low", 1), ("mid", 4), ("high", 16)])
def test_phi3_v_cuts_a_image_into_as_many_tiles_as_the_name_allows(name, crops):
    assert load(GOLDEN / "phi3v", resolution=name).backbone.processor.image_settings["num_crops"] == crops


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("llava", "gemma3", "paligemma", "mllama")])
def test_a_family_whose_images_have_one_size_says_so(family, tiny_vlm):
    with pytest.raises(UserError, match="resolution: images of this family have a fixed size") as caught:
        load(tiny_vlm(family), resolution="low")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resolution": "huge"}, "expected low, mid, high"),
        ({"resolution": "low", "max_pixels": 9}, "remove one of them"),
        ({"max_pixels": "many"}, "expected a positive number of pixels"),
        ({"min_pixels": 9}, "min_pixels: not one of"),
    ],
)
def test_a_size_that_is_none_is_one_clear_line(options, words, tiny_vlm):
    with pytest.raises(UserError, match=words) as caught:
        load(tiny_vlm("llava_next"), **options)
    assert "\n" not in str(caught.value)
