"""Builds the prompts of the later layout of MMEB's 36 sets, which stores instruction and text separately.

The reference loaders join the parts to the same bytes as in the first layout, each loader in its own way; published
scores depend on these bytes. Source: loaders `image_{cls,qa,i2t,t2i,i2i_vg}` of the reference repository, v2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.types import EmbeddingInput

Kind = Literal["image_cls", "image_qa", "image_i2t", "image_t2i", "image_i2i_vg"]
PLACEHOLDER = "<|image_1|>"


@dataclass(frozen=True)
class Prompts:
    """The texts of a row and the identities of its candidates."""

    query: str
    targets: list[str]
    identities: list[str]


def prompts_of(kind: Kind, row: dict[str, Any], set_name: str) -> Prompts:
    """Returns the texts of a row with the columns `qry_inst, qry_text, tgt_inst, tgt_text, tgt_img_path`.

    Args:
        kind: The reference loader for the set.
        row: Values by column.
        set_name: Name of the set; VisDial queries end with an additional line break.
    """
    query = _query(kind, row["qry_inst"] or "", row["qry_text"] or "", set_name)
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    if kind in ("image_cls", "image_qa", "image_i2t"):
        return Prompts(query, texts, texts)
    targets = _targets(kind, row["tgt_inst"] or "", texts)
    if kind == "image_t2i":
        return Prompts(query, targets, paths)
    captions = [text.strip('"') for text in texts]
    return Prompts(query, targets, [f"{path}:{caption}" for path, caption in zip(paths, captions, strict=True)])


def joined(instruction: str, text: str | None) -> str:
    """Joins instruction and text; if the text is missing, no space follows the instruction."""
    return f"{instruction} {text}" if text else instruction


def query_of(
    quirks: Quirks, instruction: str, text: str | None = None, token: str = "", **media: Any
) -> EmbeddingInput:
    """A query of an instruction, a text and at most one image or video.

    Args:
        quirks: Whether the prompt is the reference loaders' or the model's own.
        instruction: What to find or to answer.
        text: Of the row; may be empty.
        token: Placeholder of the medium, for the reference loaders' prompt.
        **media: `images` or `video` of the input.
    """
    if quirks.whitespace == "plain":
        return EmbeddingInput(text or None, instruction=instruction.strip(), **media)
    return EmbeddingInput(f"{token} {joined(instruction, text)}" if token else joined(instruction, text), **media)


def candidate_of(quirks: Quirks, instruction: str, token: str, **media: Any) -> EmbeddingInput:
    """A candidate without a text of its own; arguments as `query_of`."""
    if quirks.candidate_instruction == "none":
        return EmbeddingInput(**media)
    return query_of(quirks, instruction, token=token, **media)


def kind_of(row: dict[str, Any]) -> Kind:
    """Infers the loader of a set that no task table lists from which sides have images."""
    if not any(row["tgt_img_path"]):
        return "image_i2t"
    return "image_i2i_vg" if row["qry_img_path"] else "image_t2i"


def _query(kind: Kind, instruction: str, text: str, set_name: str) -> str:
    if kind == "image_t2i":
        return f"{instruction} {text}\n" + ("\n" if set_name == "VisDial" else "")
    bare = instruction.replace(PLACEHOLDER, "")
    if kind in ("image_qa", "image_i2i_vg"):
        bare = "\n" + bare.strip()
    return _with_token(bare, text) + "\n"


def _targets(kind: Kind, instruction: str, texts: list[str]) -> list[str]:
    bare = instruction.replace(PLACEHOLDER, "")
    if texts[0].strip():
        return [_with_token(f"{bare} {text}", "") + "\n" for text in texts]
    return [_with_token(bare, "") + ("\n" if kind == "image_t2i" else "")] * len(texts)


def _with_token(instruction: str, text: str) -> str:
    joined = f"{PLACEHOLDER} {instruction} {text}" if text else f"{PLACEHOLDER} {instruction}"
    return joined.replace(" \n", "\n")
