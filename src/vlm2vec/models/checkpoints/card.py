"""Writes the model card of a saved folder, `README.md`, from the other files in the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.files import read_json, write_text

CARD_FILE = "README.md"
MARK = "<!-- Written by vlm2vec. Delete this line to keep your own text when the model is saved or pushed again. -->"
FOLDER = "path/to/this/folder"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OWN_MODULE = "vlm2vec."
SERVED_FILE = "serve_vllm.sh"  # of `vlm2vec export --to vllm`


def write_card(folder: Path, name: str | None = None) -> None:
    """Writes the card, unless the folder has a card that a person wrote.

    Args:
        folder: A saved folder with `embedder.json`; `recipe.yaml`, `provenance.json`, the `results.json` of evaluations
            in subfolders (`vlm2vec eval RUN -o RUN/eval`) and `serve_vllm.sh` are used if they are there.
        name: Hub id for the examples. Default: a placeholder.
    """
    path = folder / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    write_text(path, card(folder, name))


def card(folder: Path, name: str | None = None) -> str:
    """Returns the text of the card; arguments as in `write_card`."""
    about = read_json(folder / "embedder.json")
    recipe = yaml.safe_load(_text(folder / "recipe.yaml")) or {}
    title = name or Path(str(recipe.get("output") or "An embedding model")).name
    metadata = _metadata(folder, about, recipe) | _scores(folder, title)
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---\n\n{MARK}\n\n# {title}\n", _summary(about), _training(folder, recipe)]
    return "\n".join([part for part in parts if part] + [_usage(folder, about, name or FOLDER)])


def _metadata(folder: Path, about: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata that the hub indexes. Base and data sets are listed only if they are hub ids."""
    base, adapter = about["base"], about["adapter"]
    found: dict[str, Any] = {"library_name": "vlm2vec", "pipeline_tag": "feature-extraction"}
    if license_name := base_license(base):
        found["license"] = license_name
    if _is_hub_id(base):
        found |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets := [str(recipe["data"]["root"])] if recipe.get("data") else []:
        found |= {"datasets": datasets} if all(map(_is_hub_id, datasets)) else {}
    tags = ["vlm2vec", "sentence-transformers", "feature-extraction", "multimodal", "image-text-embedding"]
    found["tags"] = tags + (["peft", "lora"] if adapter else [])
    return found


def _scores(folder: Path, title: str) -> dict[str, Any]:
    """Returns `model-index`, the scores in percent that the hub shows; empty without an evaluation."""
    results = []
    for path in sorted(folder.glob("*/results.json")):
        found = read_json(path)
        parts = {name: ("mean", score) for name, score in found["groups"].items()}
        parts |= {name: (task["metric"], task["score"]) for name, task in found["tasks"].items()}
        results += [
            {
                "task": {"type": "feature-extraction"},
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
    train, lora, loss = recipe["train"], recipe.get("lora"), recipe.get("loss") or {}
    facts = {
        "Data": f"`{recipe['data']['root']}`",
        "Sets": ", ".join(recipe["data"].get("sets") or []) or "all of the folder",
        "Steps": train["steps"],
        "Batch size": train.get("batch_size"),
        "Learning rate": train.get("learning_rate"),
        "Temperature": train.get("temperature"),
        "Loss": loss.get("kind", "info_nce"),
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
