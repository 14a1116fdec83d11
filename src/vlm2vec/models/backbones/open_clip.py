"""OpenCLIP checkpoints in open_clip's own format (`open_clip_config.json`), computed by transformers' CLIP.

The open_clip package requires torchvision even to be imported, so it is not used. Its ViT encoders are CLIP's; only the
names of the tensors differ. Encoders that CLIP's classes do not have (timm, ResNet, CoCa, HF text) are unsupported.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from safetensors.torch import load_file

from vlm2vec.errors import UserError
from vlm2vec.models.backbones.dual import DualEncoder
from vlm2vec.models.checkpoints.tensors import check_weight_files

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
PICKLE_FILE = "open_clip_pytorch_model.bin"
HEAD_WIDTH = 64
VISION_KEYS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}
MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
PREPROCESS_KEYS = {"mean", "std", "interpolation", "resize_mode", "size", "mode", "fill_color"}
RENAMES = [
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
]


class OpenClip(DualEncoder):
    """An OpenCLIP ViT with the settings of `DualEncoder`. It is saved as a CLIP checkpoint of transformers."""

    name: ClassVar[str] = "open_clip"

    @classmethod
    def load(
        cls,
        source: str,
        dtype: torch.dtype,
        revision: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Loads a folder with `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer's files."""
        cls.check_settings(source, options)
        folder = Path(source)
        try:
            about = json.loads((folder / CONFIG_FILE).read_text())
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{source}: cannot read {CONFIG_FILE} and the tokenizer files: {reason}") from error
        config = clip_config(folder / CONFIG_FILE, about["model_cfg"], tokenizer)
        check_weight_files(source, allow_pickle)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file() and not (allow_pickle and (folder / PICKLE_FILE).is_file()):
            raise UserError(f"{weights}: missing; expected a safetensors file")
        model: Any = transformers.CLIPModel(config)
        try:
            pickled = folder / PICKLE_FILE
            state = load_file(weights) if weights.is_file() else torch.load(pickled, "cpu", weights_only=True)
            model.load_state_dict(renamed(state))
        except RuntimeError as error:
            raise UserError(f"{weights}: does not fit the model ({' '.join(str(error).split())[:200]})") from error
        images = image_processor(folder / CONFIG_FILE, about.get("preprocess_cfg", {}), config)
        return cls(model.to(dtype), tokenizer, images, options)


def clip_config(path: Path, model: dict[str, Any], tokenizer: Any) -> Any:
    """open_clip's model configuration as transformers' `CLIPConfig`.

    Raises:
        UserError: naming a setting that CLIP's classes do not have.
    """
    for name, part, known in (
        ("model_cfg", model, MODEL_KEYS),
        ("vision_cfg", model["vision_cfg"], VISION_KEYS),
        ("text_cfg", model["text_cfg"], TEXT_KEYS),
    ):
        if unknown := sorted(set(part) - known):
            raise UserError(
                f"{path}: {name}.{unknown[0]}: only CLIP's ViT and text encoders are supported; "
                "use a checkpoint in transformers' format"
            )
    vision, text = model["vision_cfg"], model["text_cfg"]
    if not isinstance(vision["layers"], int):
        raise UserError(f"{path}: vision_cfg.layers: expected a number (ResNet encoders are unsupported)")
    common = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", "projection_dim": model["embed_dim"]}
    return transformers.CLIPConfig(
        projection_dim=model["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", HEAD_WIDTH),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **common,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": text["width"] * 4,
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **common,
        },
    )


def image_processor(path: Path, settings: dict[str, Any], config: Any) -> Any:
    """open_clip's image settings as transformers' PIL processor.

    Raises:
        UserError: for a resize mode that it does not have.
    """
    mode, filter_name = settings.get("resize_mode", "shortest"), settings.get("interpolation", "bicubic")
    filters = {"bicubic": 3, "bilinear": 2}
    if mode not in ("shortest", "squash") or filter_name not in filters or set(settings) - PREPROCESS_KEYS:
        raise UserError(
            f"{path}: preprocess_cfg {settings}: expected resize_mode shortest or squash, bicubic or bilinear"
        )
    side = config.vision_config.image_size
    sides = {"height": side, "width": side}
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side} if mode == "shortest" else sides,
        crop_size=sides,
        do_center_crop=mode == "shortest",
        resample=filters[filter_name],
        image_mean=list(settings.get("mean", transformers.image_utils.OPENAI_CLIP_MEAN)),
        image_std=list(settings.get("std", transformers.image_utils.OPENAI_CLIP_STD)),
    )


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors under the names of `CLIPModel`. Joint attention weights are split, projections transposed."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        joint = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name)
        if joint:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            result.update({f"{joint[1]}.{part}.{joint[2]}": value for part, value in parts})
        elif name in ("visual_projection.weight", "text_projection.weight"):
            result[name] = tensor.T.contiguous()
        elif name != "attn_mask":
            result[name] = tensor
    return result
