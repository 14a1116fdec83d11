"""A family's own processor of transformers, with its pictures made by PIL and without what needs torchvision."""

from __future__ import annotations

from typing import Any

import transformers

from vlm2vec.errors import UserError

SETTINGS = {"padding_side": ("right", "left"), "positions": ("auto", "text", "vision-start", "multimodal")}


def load_processor(source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
    """The processor without its video part, which needs torchvision; PIL, so that vectors do not depend on that.

    Args:
        source: A folder or hub id.
        common: Revision and trust, for every part.
        options: Settings of `Generic`; what is not its own is the image processor's.

    Raises:
        UserError: for a setting that neither has.
    """
    images = load_image_processor(source, common, options)
    saved, _ = transformers.ProcessorMixin.get_processor_dict(source, revision=common["revision"])
    usual = transformers.PROCESSOR_MAPPING[type(transformers.AutoConfig.from_pretrained(source, **common))]
    family: Any = getattr(transformers, saved.get("processor_class", ""), usual)
    parts = {"image_processor": images, "tokenizer": transformers.AutoTokenizer.from_pretrained(source, **common)}
    names = family.get_attributes()
    kept = [name for name in names if name != "video_processor"]
    pictures_only: Any = type(family.__name__, (family,), {"get_attributes": classmethod(lambda _: kept)})
    return pictures_only.from_args_and_dict([parts.get(name) for name in names], saved)


def load_image_processor(source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
    """The image processor with these settings.

    Raises:
        UserError: for a setting that neither it nor `Generic` has.
    """
    settings = {name: value for name, value in options.items() if name not in SETTINGS}
    images = transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **common, **settings)
    known = {**dict.fromkeys(images.valid_kwargs.__annotations__), **SETTINGS}
    for name, value in options.items():
        if name not in known or value not in (SETTINGS.get(name) or (value,)):
            raise UserError(f"setting {name}={value!r}: allowed are {SETTINGS} and {', '.join(sorted(known))}")
    return images
