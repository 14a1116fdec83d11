"""The parts of a model card that differ for rerankers."""

from __future__ import annotations

from typing import Any

KIND = ("text-ranking", ("cross-encoder", "reranker", "multimodal"))
"""The hub's task, and tags."""


def summary(about: dict[str, Any]) -> str:
    """Returns what the model is.

    Args:
        about: Content of `reranker.json`.
    """
    kind = "a LoRA adapter on" if about["adapter"] else "a fine-tuned copy of"
    yes, no = about["prompt"]["answers"]
    head = "a trained linear layer" if about["trained_head"] else f'the logit of "{yes}" less that of "{no}"'
    if about.get("head") == "product":
        head += ", plus the scaled cosine between the states at the end of query and prompt,"
    return f"""This model reads a query together with a candidate, each text, images or both, and scores relevance.
It is {kind} `{about["base"]}`. The score is given by {head} at the last token of the prompt.
"""


def usage(name: str) -> str:
    """Returns how to use the model.

    Args:
        name: Hub id, or a placeholder.
    """
    return f"""## Use it

With vlm2vec (`pip install vlm2vec`):

```python
from pathlib import Path
from vlm2vec import Reranker

reranker = Reranker.from_pretrained("{name}")
for found in reranker.rank("a dog on the beach", [Path("17.jpg"), Path("18.jpg"), "a text"]):
    print(found.index, found.score)
```

With sentence-transformers (`pip install 'vlm2vec[st]'`):

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}", trust_remote_code=True)
scores = model.predict([("a dog on the beach", {{"image": "17.jpg"}}), ("a dog on the beach", "a text")])
```

Behind a server, as the second stage of an embedding model:

```
vlm2vec serve EMBEDDER --reranker {name} --port 8000
```
"""
