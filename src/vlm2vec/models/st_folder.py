"""Writes the files that make a checkpoint folder a sentence-transformers model; `st_reading.py` reads them.

The files are JSON files next to the weights, in the layout of version 6.2; sentence-transformers is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm2vec.files import write_json, write_text
from vlm2vec.models.pooling import JOIN, POOLINGS
from vlm2vec.models.prompts import CHAT_IMAGE, PromptTemplate

MODULES_FILE = "modules.json"
CONFIG_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
CHAT_FILE = "chat_template.jinja"
RERANKER_FILE = "reranker.json"
OWN_MODULE = "vlm2vec.models.st_module.EmbedderModule"
OWN_RERANKER = "vlm2vec.models.reranking.st_module.RerankerModule"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE = "sentence_transformers.base.modules.dense.Dense"
NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
POOLING_MODES = {name: "lasttoken" if name == "last" else name for name in POOLINGS}

# Collects the parts of the messages. Parts that the prompt template does not support raise an error.
_COLLECT = """\
{%- set ns = namespace(images=0, before=0, text=none, instruction='', named=false, prompt='') -%}
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- for part in parts -%}
{%- if message.role == 'system' -%}{%- set ns.instruction = ns.instruction ~ part.text -%}
{%- elif part.type == 'image' -%}{%- set ns.images = ns.images + 1 -%}
{%- if ns.before -%}{{ raise_exception('text between images: name their places by <|image_k|> in the text') }}
{%- endif -%}
{%- elif part.type != 'text' -%}{{ raise_exception('this model reads text and images, not ' ~ part.type) }}
{%- elif ns.text is not none -%}{{ raise_exception('this model reads one text an input') }}
{%- else -%}{%- set ns.text = part.text -%}{%- set ns.before = ns.images -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- set ns.text = ns.text or '' -%}
{%- for k in range(1, 10) if ('<|image_' ~ k) in ns.text -%}{%- set ns.named = true -%}{%- endfor -%}
"""
_VERBATIM = """\
{%- if ns.named -%}
{%- set ns.prompt = ns.text -%}
{%- for k in range(1, ns.images + 1) -%}
{%- set pieces = ns.prompt.split('<|image_' ~ k ~ '|>') -%}
{%- if pieces | length != 2 -%}{{ raise_exception('expected one <|image_k|> for each image') }}{%- endif -%}
{%- for j in range(1, 10) if ('<|image_' ~ j) in pieces[0] -%}
{{ raise_exception('sentence-transformers takes the images in the order of their placeholders only') }}
{%- endfor -%}
{%- set ns.prompt = pieces | join(IMAGE) -%}
{%- endfor -%}
{%- for j in range(1, 10) if ('<|image_' ~ j) in ns.prompt -%}
{{ raise_exception('expected one <|image_k|> for each image') }}
{%- endfor -%}
{%- if ns.images and IMAGE_START not in ns.prompt -%}
{{ raise_exception('an image without ' ~ IMAGE_START ~ ' has text positions, which this library cannot give') }}
{%- endif -%}
{%- else -%}
{%- set words = INSTRUCTION_OPEN ~ ns.instruction ~ INSTRUCTION_CLOSE if ns.instruction else '' -%}
{%- set words = words ~ (SEPARATOR if words and ns.text else '') ~ ns.text -%}
{%- set pictures = PICTURE * ns.images -%}
{%- set ns.prompt = pictures ~ words ~ (SUFFIX if pictures and words else '') -%}
{%- endif -%}
{{- ns.prompt -}}
"""
# If a dict has its text first, its images are moved to the front, as in the prompt template.
_IMAGES_FIRST = """\
{%- set ordered = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set parts = [] if message.content is string else message.content -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | list -%}
{%- if texts | length == 1 and parts[0].type == 'text' -%}
{%- set ordered.messages = ordered.messages + [dict(message, content=parts[1:] + parts[:1])] -%}
{%- else -%}
{%- set ordered.messages = ordered.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ordered.messages -%}
"""
_NO_PLACEHOLDERS = """\
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == 'text' and '<|image_1|>' in part.text -%}
{{ raise_exception('<|image_1|> in a text: give the image beside the text, or load the folder with vlm2vec') }}
{%- endfor -%}
{%- endfor -%}
"""


def chat_template(template: PromptTemplate, image_token: str, image_start: str = "") -> str:
    """Converts a prompt template to a Jinja chat template for sentence-transformers that renders the same bytes.

    Args:
        template: The prompt template.
        image_token: The backbone's image token.
        image_start: Token before an image that is required for multimodal positions; "" if not needed.
    """
    if template.chat:
        first = "" if template.keeps_order else _IMAGES_FIRST
        return _NO_PLACEHOLDERS + first + template.chat.replace(CHAT_IMAGE, image_token)
    opening, closing = template.instruction.format(instruction="\0").split("\0")
    words = {
        "IMAGE": image_token,
        "IMAGE_START": image_start,
        "INSTRUCTION_OPEN": opening,
        "INSTRUCTION_CLOSE": closing,
        "SEPARATOR": template.separator,
        "PICTURE": template.image.format(image=image_token),
        "SUFFIX": template.suffix,
    }
    constants = "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in words.items()
    )
    return constants + _COLLECT + _VERBATIM


def write_native(
    folder: Path, chat: str, pooling: str, dim: int, prompts: Mapping[str, str], max_length: int | None = None
) -> None:
    """Writes the files with which sentence-transformers loads a VLM using its own modules.

    Args:
        folder: Folder that already contains the weights, `config.json` and the processor.
        chat: The chat template; replaces that of the base model.
        pooling: Keys of `POOLINGS`, joined by "+".
        dim: Length of a token's hidden state.
        prompts: Instructions by name (`query`, `document`, `default`).
        max_length: Longer texts are truncated to this number of tokens.
    """
    text = {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    write_text(folder / CHAT_FILE, chat)
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities: dict[str, Any] = dict.fromkeys(("text", "image", "image+text"), forward)
    about = {
        "transformer_task": "feature-extraction",
        "modality_config": {**modalities, "message": {**forward, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"text": text},
    }
    modes = [POOLING_MODES[name] for name in pooling.split(JOIN)]
    pooling_config = {
        "embedding_dimension": dim,
        "pooling_mode": modes[0] if len(modes) == 1 else modes,
        "include_prompt": True,
    }
    write_json(folder / TRANSFORMER_FILE, about)
    write_json(folder / "1_Pooling/config.json", pooling_config)
    write_json(
        folder / "2_Normalize/config.json",
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    )
    _write_modules(folder, {"": TRANSFORMER, "1_Pooling": POOLING, "2_Normalize": NORMALIZE}, prompts)


def write_text_and_vision_modules(folder: Path, methods: Mapping[str, str], text_settings: Mapping[str, Any]) -> None:
    """Like `write_native`, for a dual encoder: one method of the HF model per modality, without fusion of both.

    Args:
        folder: Folder that already contains the weights, `config.json` and the processor.
        methods: Method names by modality.
        text_settings: Settings of the tokenizer, such as `padding`. Dual encoders have no instructions.
    """
    about = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            name: {"method": method, "method_output_name": "pooler_output"} for name, method in methods.items()
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"truncation": True, **text_settings}},
    }
    write_json(folder / TRANSFORMER_FILE, about)
    write_json(
        folder / "1_Normalize/config.json",
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    )
    _write_modules(folder, {"": TRANSFORMER, "1_Normalize": NORMALIZE}, {})


def write_own(folder: Path, prompts: Mapping[str, str]) -> None:
    """Registers this package's module, for models that sentence-transformers' own modules cannot compute."""
    _write_modules(folder, {"": OWN_MODULE}, prompts)


def write_reranker(folder: Path) -> None:
    """Registers the module with which CrossEncoder loads a folder that has `reranker.json`."""
    _write_modules(folder, {"": OWN_RERANKER}, {}, "CrossEncoder")


def write_head(folder: Path, dense: Sequence[str], truncate_dim: int | None) -> None:
    """Adds the layers after the pooling to the files written by one of the other functions.

    Args:
        folder: Folder with `modules.json`.
        dense: Subfolders of `Dense` layers, in order. This package's own module loads them by `embedder.json`.
        truncate_dim: Number of dimensions that are kept.
    """
    rows = json.loads((folder / MODULES_FILE).read_text())
    if rows[0]["type"] != OWN_MODULE:
        paths = [(row["path"], row["type"]) for row in rows]
        paths[-1:-1] = [(path, DENSE) for path in dense]  # before Normalize
        write_json(folder / MODULES_FILE, _rows(paths))
    if truncate_dim is not None:
        about = json.loads((folder / CONFIG_FILE).read_text())
        write_json(folder / CONFIG_FILE, {**about, "truncate_dim": truncate_dim})


def _rows(modules: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]


def _write_modules(
    folder: Path, modules: Mapping[str, str], prompts: Mapping[str, str], kind: str = "SentenceTransformer"
) -> None:
    write_json(folder / MODULES_FILE, _rows(modules.items()))
    try:
        written_for = version("sentence-transformers")
    except PackageNotFoundError:
        written_for = "6.2.0"
    about: dict[str, Any] = {
        "__version__": {name: version(name) for name in ("transformers",)}
        | {"pytorch": version("torch"), "sentence_transformers": written_for},
        "model_type": kind,
    }
    if kind == "SentenceTransformer":
        about |= {
            "prompts": {"query": "", "document": "", **prompts},
            "default_prompt_name": "default" if prompts.get("default") else None,
            "similarity_fn_name": "cosine",
        }
    write_json(folder / CONFIG_FILE, about)
