"""Writes the model card of a saved folder, `README.md`, from the other files in the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.files import read_json, write_text
from vlm2vec.models.checkpoints import card_reranker
from vlm2vec.models.st_folder import RERANKER_FILE

CARD_FILE = "README.md"
MARK = "<!-- Written by vlm2vec. Delete this line to keep your own text when the model is saved or pushed again. -->"
FOLDER = "path/to/this/folder"
KIND = ("feature-extraction", ("feature-extraction", "multimodal", "image-text-embedding"))
"""The hub's task, and tags."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OWN_MODULE = "vlm2vec."
SERVED_FILE = "serve_vllm.sh"  # of `vlm2vec export --to vllm`


def write_card(folder: Path, name: str | None = None) -> None:
    """Writes the card, unless the folder has a card that a person wrote.

    Args:
        folder: A saved folder with `embedder.json` or `reranker.json`; `recipe.yaml`, `provenance.json`, the
            `results.json` of evaluations in subfolders (`vlm2vec eval RUN -o RUN/eval`) and `serve_vllm.sh` are used if
            they are there.
        name: Hub id for the examples. Default: a placeholder.
    """
    path = folder / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    write_text(path, card(folder, name))


def card(folder: Path, name: str | None = None) -> str:
    """Returns the text of the card; arguments as in `write_card`."""
    ranker = read_json(folder / RERANKER_FILE)
    about = ranker or read_json(folder / "embedder.json")
    recipe = yaml.safe_load(_text(folder / "recipe.yaml")) or {}
    title = name or Path(str(recipe.get("output") or f"{'A reranker' if ranker else 'An embedding'} model")).name
    metadata = _metadata(about, recipe, *(card_reranker.KIND if ranker else KIND)) | _scores(
        folder, title, bool(ranker)
    )
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    summary, shown = card_reranker.summary(about) if ranker else _summary(about), name or FOLDER
    usage = card_reranker.usage(shown) if ranker else _usage(folder, about, shown)
    parts = [f"---\n{header}---\n\n{MARK}\n\n# {title}\n", summary, _training(folder, recipe), usage]
    return "\n".join(part for part in parts if part)


def _metadata(about: dict[str, Any], recipe: dict[str, Any], task: str, tags: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metadata that the hub indexes. Base and data sets are listed only if they are hub ids."""
    base, adapter = about["base"], about["adapter"]
    found: dict[str, Any] = {"library_name": "vlm2vec", "pipeline_tag": task}
    if license_name := base_license(base):
        found["license"] = license_name
    if _is_hub_id(base):
        found |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets := [str(recipe["data"]["root"])] if recipe.get("data") else []:
        found |= {"datasets": datasets} if all(map(_is_hub_id, datasets)) else {}
    found["tags"] = ["vlm2vec", "sentence-transformers", *tags] + (["peft", "lora"] if adapter else [])
    return found


def _scores(folder: Path, title: str, reranked: bool) -> dict[str, Any]:
    """Returns `model-index`, the scores in percent that the hub shows; empty without an evaluation.

    Args:
        folder: Its subfolders have `results.json`.
        title: Name of the model.
        reranked: Take the scores after reranking, and only evaluations that have them.
    """
    results = []
    for path in sorted(folder.glob("*/results.json")):
        found = read_json(path)
        groups = found.get("reranked_groups", {}) if reranked else found["groups"]
        parts = {name: ("mean", score) for name, score in groups.items()}
        for name, task in found["tasks"].items():
            scored = task.get("reranked") if reranked else task
            parts |= {name: (task["metric"], scored["score"])} if scored else {}
        results += [
            {
                "task": {"type": (card_reranker.KIND if reranked else KIND)[0]},
                "dataset": {"type": found["benchmark"], "name": f"{found['benchmark']} {name}"},
                "metrics": [{"type": metric, "value": round(100 * score, 1)}],
            }
            for name, (metric, score) in parts.items()
        ]
    return {"model-index": [{"name": title, "results": results}]} if results else {}


def base_license(base: str) -> str | None:
    """Returns the licence in the card of a base folder; None if it is not available locally."""
    text = _text(Path(base) / CARD_FILE)
    if not text.startswith("---\n"):
        return None
    try:
        header = yaml.safe_load(text.split("---\n")[1])
    except yaml.YAMLError:
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def _summary(about: dict[str, Any]) -> str:
    kind = "a LoRA adapter on" if about["adapter"] else "a fine-tuned copy of"
    prompts = [f'- {name}: "{text}"' for name, text in about["prompts"].items() if text]
    told = ["", "Instructions used by default:", "", *prompts] if prompts else []
    lines = [
        f"This model embeds text, images or both in one vector of {about['embedding_dim']} dimensions with unit norm.",
        f"It is {kind} `{about['base']}`, with {about['pooling']} pooling.",
        *told,
    ]
    return "\n".join(lines) + "\n"


def _training(folder: Path, recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    train, lora, rerank = recipe["train"], recipe.get("lora"), recipe.get("rerank") or {}
    is_reranker = recipe.get("task") == "rerank"
    facts = {
        "Data": f"`{recipe['data']['root']}`",
        "Sets": ", ".join(recipe["data"].get("sets") or []) or "all of the folder",
        "Steps": train["steps"],
        "Batch size": train.get("batch_size"),
        "Learning rate": train.get("learning_rate"),
        "Temperature": None if is_reranker else train.get("temperature"),
        "Loss": rerank.get("loss") if is_reranker else (recipe.get("loss") or {}).get("kind", "info_nce"),
        "Candidates of a query": rerank.get("candidates") if is_reranker else None,
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']}" if lora else "none: all chosen weights",
        "Seed": train.get("seed"),
    }
    versions = (read_json(folder / "provenance.json") or {}).get("versions") or {}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    return (
        "\n".join(["## Training\n", "| setting | value |", "|---|---|", *rows, "", "The full recipe: `recipe.yaml`."])
        + "\n"
    )


def _served(folder: Path, name: str) -> str:
    """Returns the start of a vLLM server, if the folder was exported for it."""
    script = _text(folder / SERVED_FILE)
    if not script:
        return ""
    local = Path(name).name
    command = script.splitlines()[-1].removeprefix("exec ").removesuffix(' "$@"')
    return f"""
The same client works with vLLM, with `model="{local}"`, and with images as chat `messages` in place of `input`:

```
hf download {name} --local-dir {local}
{command}
```
"""


def _usage(folder: Path, about: dict[str, Any], name: str) -> str:
    modules = read_json(folder / "modules.json") or [{"type": OWN_MODULE}]
    needs_us = modules[0]["type"].startswith(OWN_MODULE)
    flag = ", trust_remote_code=True" if needs_us else ""
    extra = "pip install 'vlm2vec[st]'" if needs_us else "pip install sentence-transformers"
    return f"""## Use it

With vlm2vec (`pip install vlm2vec`):

```python
from pathlib import Path
from vlm2vec import Embedder

model = Embedder.from_pretrained("{name}")
vectors = model.encode(["a dog on the beach", Path("photo.jpg"), {{"text": "in red", "image": Path("photo.jpg")}}])
print(model.similarity(vectors, vectors))
```

With sentence-transformers (`{extra}`):

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{flag})
vectors = model.encode(["a dog on the beach", Image.open("photo.jpg")])
```

With any OpenAI client, from a server:

```
vlm2vec serve {name} --port 8000
```

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
vector = client.embeddings.create(model="vlm2vec", input="a dog on the beach").data[0].embedding
```
{_served(folder, name)}"""


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
