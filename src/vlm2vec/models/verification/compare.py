"""Compares vectors with those of another library and finds the first stage of the computation that differs.

The stages are prompt bytes, token ids, pixel values, positions, network and pooling.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.prompts import PLACEHOLDER, chat_messages, split_at_images
from vlm2vec.models.verification.golden import golden_inputs, ordered_inputs
from vlm2vec.types import EmbeddingInput

SAME = 0.9999
NETWORK = "weights or computation"


@dataclass(frozen=True)
class Stages:
    """Intermediate results of another library for an input; None: not exposed by that library.

    Attributes:
        prompt: Input text of the tokenizer.
        token_ids: Token ids without padding.
        num_tokens: Number of tokens, if the ids are not exposed.
        pixels: Pixel values by tensor name.
        positions: Positions of the rotary embeddings, [..., L].
        last_state: Hidden state of the last token, before pooling.
        vector: The unit-norm vector.
    """

    vector: np.ndarray
    prompt: str | None = None
    token_ids: list[int] | None = None
    num_tokens: int | None = None
    pixels: Mapping[str, torch.Tensor] | None = None
    positions: torch.Tensor | None = None
    last_state: np.ndarray | None = None


@dataclass(frozen=True)
class Difference:
    """Result for an input: its cosine, and the first stage that differs if the cosine is below `SAME`.

    Attributes:
        about: Description of the input.
        cosine: Cosine of both vectors; None if the other library rejected the input.
        stage: The first stage that differs; "" if the vectors are equal.
        detail: Description of the difference.
    """

    about: str
    cosine: float | None
    stage: str = ""
    detail: str = ""


def compare(embedder: Embedder, other: Callable[[EmbeddingInput], Stages]) -> list[Difference]:
    """Encodes the golden inputs, and inputs with every order of text and images, with both libraries.

    Args:
        embedder: The embedder, in float32.
        other: The other library; it raises `UserError` for inputs that it rejects.
    """
    found = []
    for item in [*golden_inputs(), *ordered_inputs()]:
        about = _described(item)
        try:
            theirs = other(item)
        except UserError as error:
            found.append(Difference(about, None, "refused", str(error)))
            continue
        ours = embedder.encode([item])[0]
        cosine = float(ours @ theirs.vector / max(float(np.linalg.norm(theirs.vector)), 1e-12))
        stage, detail = ("", "") if cosine >= SAME else first_difference(embedder, item, theirs)
        found.append(Difference(about, cosine, stage, detail))
    return found


def _described(item: EmbeddingInput) -> str:
    """Describes the parts of an input in their order."""
    text = ["text"] if item.text else []
    images = ["image"] * len(item.images)
    if PLACEHOLDER.search(item.text or ""):
        parts = ["image" if isinstance(piece, int) else "text" for piece in split_at_images(item.text or "")]
    else:
        parts = text + images if item.text_first else images + text
    return " + ".join(parts) + (" with instruction" if item.instruction else "")


@torch.inference_mode()
def first_difference(embedder: Embedder, item: EmbeddingInput, theirs: Stages) -> tuple[str, str]:
    """Returns the first stage at which the two computations differ, and a description of the difference."""
    backbone: Any = embedder.backbone
    batch = backbone.process([item])
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    if theirs.prompt is not None and hasattr(backbone, "prompt"):
        prompt = backbone.prompt(item)[0]
        if prompt != theirs.prompt:
            return "prompt bytes", f"here {prompt[:80]!r}, there {theirs.prompt[:80]!r}"
    if theirs.token_ids is not None and ids != theirs.token_ids:
        return "token ids", f"here {ids[:12]} of {len(ids)}, there {theirs.token_ids[:12]} of {len(theirs.token_ids)}"
    if theirs.num_tokens is not None and len(ids) != theirs.num_tokens:
        return "prompt bytes or token ids", f"here {len(ids)} tokens, there {theirs.num_tokens}"
    for name, value in (theirs.pixels or {}).items():
        mine = batch.get(name)
        if mine is None or mine.numel() != value.numel():
            return (
                "pixel values",
                f"{name}: here {list(mine.shape) if mine is not None else None}, there {list(value.shape)}",
            )
        gap = (mine.flatten().float() - value.flatten().float().cpu()).abs().max().item()
        if gap > 1e-3:
            return "pixel values", f"{name}: largest difference {gap:.3g}"
    mine = batch.get("position_ids")
    if (
        mine is not None
        and theirs.positions is not None
        and not torch.equal(mine.flatten(), theirs.positions.flatten())
    ):
        return "positions", f"here up to {int(mine.max())}, there up to {int(theirs.positions.max())}"
    if theirs.last_state is not None and isinstance(backbone, DecoderBackbone):
        states = backbone.hidden_states(batch.to(embedder.device))[0]
        last = states[batch["attention_mask"][0].bool()][-1].float().cpu().numpy()
        cosine = last @ theirs.last_state / (np.linalg.norm(last) * np.linalg.norm(theirs.last_state))
        if cosine >= SAME:
            return "pooling", "the last hidden states are equal, the vectors are not"
    return NETWORK, "all exposed stages before the network are equal"


def sentence_transformers(folder: Path, chat: bool) -> Callable[[EmbeddingInput], Stages]:
    """Returns a function that encodes with sentence-transformers in float32.

    Args:
        folder: The checkpoint.
        chat: Whether its template is a chat template; text between images is then passed as a message.

    Raises:
        UserError: if sentence-transformers is not installed or cannot load the folder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError("sentence-transformers is not installed: pip install 'vlm2vec[st]'") from error
    try:
        if st_folder.OWN_MODULE in (folder / st_folder.MODULES_FILE).read_text():
            from vlm2vec.models.st_module import sentence_transformer

            own = sentence_transformer(folder, torch.float32)
            return lambda item: _reference_stages(own, item, chat)
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    except (ValueError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: sentence-transformers cannot load it: {reason}") from error
    return lambda item: _reference_stages(model, item, chat)


@torch.inference_mode()
def _reference_stages(model: Any, item: EmbeddingInput, chat: bool) -> Stages:
    images = [image.load() for image in item.images]
    value: Any = item.text
    if images and chat and PLACEHOLDER.search(item.text or ""):
        value = _interleaved(item, images)
    elif images:
        parts = {"image": images if len(images) > 1 else images[0]} | ({"text": item.text} if item.text else {})
        value = dict(reversed(parts.items())) if item.text_first else parts
    try:
        features = model.preprocess([value], prompt=item.instruction)
    except (ValueError, TemplateError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    pixels = {name: features[name] for name in ("pixel_values", "image_grid_thw") if name in features}
    ids = (
        features["input_ids"][0][features["attention_mask"][0].bool()].tolist()
        if "attention_mask" in features
        else None
    )
    output = model(dict(features))
    states = output.get("token_embeddings")
    last = None if states is None else states[0][features["attention_mask"][0].bool()][-1].numpy()
    prompt, grid = None, features.get("image_grid_thw")
    if features.get("modality") == "message":
        system = (
            [{"role": "system", "content": [{"type": "text", "text": item.instruction}]}] if item.instruction else []
        )
        messages = [*system, *(value if isinstance(value, list) else _turn(value))]
        prompt = model[0].processor.apply_chat_template(messages, tokenize=False)
    positions = None
    if grid is not None and hasattr(getattr(model[0], "model", None), "get_rope_index"):
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        positions = model[0].model.get_rope_index(**{name: features[name] for name in names})[0].permute(1, 2, 0)
    return Stages(output["sentence_embedding"][0].numpy(), prompt, ids, None, pixels, positions, last)


def _turn(value: Any) -> list[dict[str, Any]]:
    """Returns the user turn that sentence-transformers builds from a text or from a dict of text and images."""
    content: list[dict[str, Any]] = []
    for kind, given in (value if isinstance(value, dict) else {"text": value}).items():
        content += [{"type": kind, kind: part} for part in (given if isinstance(given, list) else [given])]
    return [{"role": "user", "content": content}]


def _interleaved(item: EmbeddingInput, images: list[Any]) -> list[dict[str, Any]]:
    """Returns a user turn with each decoded image at the position of its placeholder."""
    turns = chat_messages(replace(item, instruction=None))[0]
    for part in turns[0]["content"]:
        if part["type"] == "image":
            part["image"] = images[part.pop("index") - 1]
    return turns


def server(url: str, model: str = "vlm2vec", timeout: float = 60.0) -> Callable[[EmbeddingInput], Stages]:
    """Returns a function that encodes with a server with OpenAI's `/v1/embeddings`; images are sent as in vLLM.

    Args:
        url: Base URL without `/v1/embeddings`.
        model: Name of the model on the server.
        timeout: Timeout of a request in seconds.
    """
    where = url.rstrip("/").removesuffix("/v1/embeddings").removesuffix("/v1") + "/v1/embeddings"
    if not where.startswith(("http://", "https://")):
        raise UserError(f"--url {url}: expected http://HOST:PORT")

    def ask(item: EmbeddingInput) -> Stages:
        plain = not item.images and not item.instruction
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in item.images
        ]
        text = [{"type": "text", "text": item.text}] if item.text else []
        content = text + content if item.text_first else content + text
        system = [{"role": "system", "content": item.instruction}] if item.instruction else []
        messages = [*system, {"role": "user", "content": content}]
        body = {
            "model": model,
            "encoding_format": "float",
            **({"input": [item.text]} if plain else {"messages": messages}),
        }
        answer = _post(where, body, timeout)
        try:
            vector = np.asarray(answer["data"][0]["embedding"], dtype=np.float32)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the response has no data[0].embedding: {str(answer)[:100]}") from error
        return Stages(vector, num_tokens=(answer.get("usage") or {}).get("prompt_tokens"))

    return ask


def _post(url: str, body: dict[str, Any], timeout: float) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error.code}: {error.read(200).decode(errors='replace')}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{url}: no response ({error})") from error


def _data_uri(image: ImageRef) -> str:
    encoded = io.BytesIO()
    image.load().save(encoded, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def vllm(folder: Path, embedder: Embedder) -> Callable[[EmbeddingInput], Stages]:
    """Returns a function that encodes with vLLM's pooling runner. vlm2vec renders the prompt, so it is not compared.

    Raises:
        UserError: if vLLM is not installed.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError("vllm is not installed; it requires a GPU: pip install vllm") from error
    backbone: Any = embedder.backbone
    model = LLM(model=str(folder), runner="pooling", dtype="float32", enforce_eager=True)

    def ask(item: EmbeddingInput) -> Stages:
        prompt = backbone.prompt(item)[0]
        media = {"multi_modal_data": {"image": [image.load() for image in item.images]}} if item.images else {}
        output = model.embed([{"prompt": prompt, **media}])[0]
        vector = np.asarray(output.outputs.embedding, dtype=np.float32)
        return Stages(vector, token_ids=list(output.prompt_token_ids))

    return ask
