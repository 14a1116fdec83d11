"""Reads the sizes of a vision-language model that determine its cost from its config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.files import read_object

MODELS_FILE = Path(__file__).parent / "models.yaml"
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}


@dataclass(frozen=True)
class Decoder:
    """The language model.

    Attributes:
        hidden: Width of the states.
        inner: Width of the feed-forward part (three matrices).
        layers: Number of layers.
        queries: Width of all query heads.
        keys: Width of all key heads, and of all value heads.
        vocabulary: Number of token embeddings.
        norms_heads: Whether queries and keys are normalized per head (Qwen3).
        fused: Whether queries, keys and values are one linear layer, and both input projections of the feed-forward
            part are another one (Phi-3), which reduces the number of adapters.
    """

    hidden: int
    inner: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    norms_heads: bool = False
    fused: bool = False

    @property
    def adapted_inputs(self) -> int:
        """Total input width of a layer's linear layers; each input is the input of an adapter."""
        return (2 if self.fused else 5) * self.hidden + self.queries + self.inner

    @property
    def adapted_outputs(self) -> int:
        """Total output width of a layer's linear layers."""
        return self.queries + 2 * self.keys + 2 * self.hidden + 2 * self.inner

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear layers."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """All weights except norms and biases, which are below 0.1 %."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden


@dataclass(frozen=True)
class Vision:
    """The vision encoder and the projector.

    Attributes:
        width: Width of the states.
        inner: Width of the feed-forward part (two matrices).
        layers: Number of layers that run.
        patch: Weights of the patch embedding.
        projector: Weights of the projector.
        held: Weights in memory, including those of layers that do not run.
        per_token: Patches that the projector joins into one token.
        projections: Weights of the projector per token of the language model, for FLOPs.
    """

    width: int
    inner: int
    layers: int
    patch: int
    projector: int
    held: int
    per_token: int
    projections: int

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear layers."""
        return 4 * self.width**2 + 2 * self.width * self.inner


@dataclass(frozen=True)
class ImageCost:
    """Cost of an image.

    Attributes:
        tokens: Tokens in the language model.
        patches: Patches in the vision encoder.
        sequences: Number of tiles, within which the vision encoder attends; 1: the whole image.
    """

    tokens: int
    patches: int
    sequences: int = 1


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    Attributes:
        name: Name for messages.
        decoder: The language model.
        vision: The vision encoder and the projector.
        image: Function from (width, height) in pixels to the cost of an image.
    """

    name: str
    decoder: Decoder
    vision: Vision
    image: Callable[[int, int], ImageCost]


SAME_SIZES = {
    "Qwen/Qwen3-VL-Embedding-2B": "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen3-VL-Embedding-8B": "Qwen/Qwen3-VL-8B-Instruct",
}
"""Models with the configuration of the model that they were trained from."""


@cache
def known_configs() -> dict[str, dict[str, Any]]:
    """Returns the configurations that ship with the package, by hub id."""
    import yaml

    found: dict[str, dict[str, Any]] = yaml.safe_load(MODELS_FILE.read_text())
    return found


def config_of(source: str) -> dict[str, Any]:
    """Returns the configuration of a known hub id, or of a folder with a config.json.

    Raises:
        UserError: for any other source.
    """
    shipped = known_configs().get(SAME_SIZES.get(source, source))
    if shipped is not None:
        return shipped
    path = Path(source) / "config.json"
    if not path.is_file():
        known = ", ".join(sorted(known_configs()))
        raise UserError(f"{source}: planning requires a folder with a config.json, or one of {known}")
    return read_object(path)


def geometry_of(source: str, options: Mapping[str, Any] | None = None) -> Geometry:
    """Returns the sizes of a model.

    Args:
        source: A known hub id, or a folder with a config.json.
        options: The recipe's `model.options`; those that change the number of visual tokens are used.

    Raises:
        UserError: for an unsupported family.
    """
    return geometry(source, config_of(source), options or {})


def geometry(name: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Geometry:
    """Like `geometry_of`, from the content of a config.json."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UserError(f"{name}: cannot plan for model_type {shown(family)}; supported: {', '.join(sorted(FAMILIES))}")
    text = config.get("text_config") or config
    heads = int(text["num_attention_heads"])
    head = int(text.get("head_dim") or text["hidden_size"] // heads)
    decoder = Decoder(
        hidden=int(text["hidden_size"]),
        inner=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        queries=heads * head,
        keys=int(text.get("num_key_value_heads") or heads) * head,
        vocabulary=int(text["vocab_size"]),
        norms_heads=family.startswith("qwen3"),
        fused=family == "phi3_v",
    )
    vision, image = FAMILIES[family](config, decoder, options)
    return Geometry(name, decoder, vision, image)


Made = tuple[Vision, Callable[[int, int], ImageCost]]


def _qwen(config: Mapping[str, Any], decoder: Decoder, options: Mapping[str, Any]) -> Made:
    """Sizes of Qwen2-VL and Qwen3-VL: a token is a group of 2 x 2 patches; images keep their aspect ratio."""
    about = config["vision_config"]
    is_newer = config["model_type"] == "qwen3_vl"
    width = int(about["hidden_size"] if is_newer else about["embed_dim"])
    inner = int(about["intermediate_size"]) if is_newer else int(width * about["mlp_ratio"])
    patch, merge = int(about["patch_size"]), int(about.get("spatial_merge_size", 2))
    joined = width * merge**2
    merger = joined**2 + joined * decoder.hidden
    mergers = 1 + len(about.get("deepstack_visual_indexes", [])) if is_newer else 1
    embed = 3 * int(about.get("temporal_patch_size", 2)) * patch**2 * width
    layers = int(about["depth"])
    positions = int(about.get("num_position_embeddings", 0)) * width if is_newer else 0
    held = layers * (4 * width**2 + 2 * width * inner) + embed + mergers * merger + positions
    side = patch * merge
    least = int(options.get("min_pixels", 65536 if is_newer else 3136))
    most = int(options.get("max_pixels", 16777216 if is_newer else 1003520))

    def image(across: int, down: int) -> ImageCost:
        columns, rows = max(1, round(across / side)), max(1, round(down / side))
        pixels = columns * rows * side**2
        if pixels > most or pixels < least:
            bound = most if pixels > most else least
            scale = math.sqrt(across * down / bound)
            exact = (across / scale / side, down / scale / side)
            columns, rows = (max(1, (math.floor if pixels > most else math.ceil)(value)) for value in exact)
        return ImageCost(columns * rows, columns * rows * merge**2)

    vision = Vision(width, inner, layers, embed, mergers * merger, held, merge**2, mergers * merger)
    return vision, image


def _clip(about: Mapping[str, Any], layers: int, projector: int, per_token: int) -> Vision:
    """Sizes of a CLIP encoder whose first `layers` layers run."""
    width, inner = int(about["hidden_size"]), int(about["intermediate_size"])
    embed = 3 * int(about["patch_size"]) ** 2 * width
    per_layer = 4 * width**2 + 2 * width * inner
    held = int(about["num_hidden_layers"]) * per_layer + embed + projector
    return Vision(width, inner, layers, embed, projector, held, per_token, projector)


def _llava_next(config: Mapping[str, Any], decoder: Decoder, options: Mapping[str, Any]) -> Made:
    """Sizes of LLaVA-1.6: a grid of tiles without its padding, and a small copy of the whole image."""
    about = {**CLIP_L, **config["vision_config"]}
    grid = options.get("image_grid_pinpoints") or config["image_grid_pinpoints"]
    tile, patch = int(about["image_size"]), int(about["patch_size"])
    side = tile // patch
    projector = int(about["hidden_size"]) * decoder.hidden + decoder.hidden**2

    def image(across: int, down: int) -> ImageCost:
        def fit(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / across, size[0] / down)
            used = min(int(across * scale) * int(down * scale), across * down)
            return used, -(size[0] * size[1] - used)

        best = max((tuple(size) for size in grid), key=fit)
        scale = min(best[1] / across, best[0] / down)
        columns, rows = best[1] // patch, best[0] // patch
        kept = (min(columns, math.ceil(across * scale / patch)), min(rows, math.ceil(down * scale / patch)))
        tiles = 1 + (best[0] // tile) * (best[1] // tile)
        return ImageCost(kept[0] * kept[1] + kept[1] + side**2, tiles * (side**2 + 1), tiles)

    return _clip(about, int(about["num_hidden_layers"]), projector, 1), image


def _phi3_v(config: Mapping[str, Any], decoder: Decoder, options: Mapping[str, Any]) -> Made:
    """Sizes of Phi-3.5-V: up to `num_crops` tiles and a small copy of the whole image; a token is 2 x 2 patches."""
    about = {**CLIP_L, **(config.get("vision_config") or {})}
    projector = 4 * int(about["hidden_size"]) * decoder.hidden + decoder.hidden**2
    num_crops = int(options.get("num_crops", 4))

    def image(across: int, down: int) -> ImageCost:
        ratio = max(across, down) / min(across, down)
        long = 1
        while (long + 1) * math.ceil((long + 1) / ratio) <= num_crops:
            long += 1
        short = math.ceil(int(long * 336 / ratio) / 336)
        rows, columns = (long, short) if across < down else (short, long)
        tiles = 1 + rows * columns
        return ImageCost(rows * 12 * (columns * 12 + 1) + 1 + 12 * 13, tiles * (24**2 + 1), tiles)

    return _clip(about, int(about["num_hidden_layers"]) - 1, projector, 4), image


FAMILIES: dict[str, Callable[[Mapping[str, Any], Decoder, Mapping[str, Any]], Made]] = {
    "llava_next": _llava_next,
    "phi3_v": _phi3_v,
    "qwen2_vl": _qwen,
    "qwen3_vl": _qwen,
}
