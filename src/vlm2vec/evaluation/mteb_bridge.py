"""Bridge to MTEB 2 (extra `mteb`): models of this project on its benchmarks, and its models on our tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.types import EmbeddingInput, Encoder, EvalQuery

if TYPE_CHECKING:
    import mteb

PLACEHOLDER = re.compile(r"<\|image_\d+\|>\s*")
MTEB_METRICS = {"hit": "hit_rate_at", "ndcg": "ndcg_at", "ndcg_linear": "ndcg_at", "recall": "recall_at"}
MTEB_METRICS |= {"precision": "precision_at"}


def _mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise UserError("MTEB is not installed; pip install 'vlm2vec[mteb]'") from error
    return mteb


class MtebEncoder:
    """An `Embedder` (or any `Encoder`) as an MTEB 2 encoder of text, images and both.

    `mteb.evaluate(MtebEncoder(embedder, "me/model"), tasks)` runs it, on MIEB and ViDoRe among others. The prompt that
    a task's metadata gives for a side becomes the instruction of that side's inputs.

    Args:
        encoder: Computes the vectors.
        name: `organisation/model`, as MTEB names models.
        revision: Revision of the model, under which MTEB saves results.
        use_prompts: Use the prompts of tasks as instructions.
    """

    def __init__(self, encoder: Encoder, name: str, revision: str = "local", use_prompts: bool = True) -> None:
        self.encoder = encoder
        self.name = name if "/" in name else f"local/{Path(name).name}"
        self.revision = revision
        self.use_prompts = use_prompts

    @property
    def mteb_model_meta(self) -> mteb.models.ModelMeta:
        """The metadata that MTEB requires of a model."""
        facts = {
            "name": self.name,
            "revision": self.revision,
            "modalities": ["text", "image"],
            "similarity_fn_name": "cosine",
            "use_instructions": self.use_prompts,
            "embed_dim": getattr(self.encoder, "embedding_dim", None),
        }
        meta: mteb.models.ModelMeta = _mteb().models.ModelMeta.create_empty(facts)
        return meta

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors [N, D] of batches with any of the columns `text` and `image`."""
        instruction = self._instruction(task_metadata, prompt_type)
        items = [item for batch in inputs for item in _items(batch, instruction)]
        return np.asarray(self.encoder.encode(items))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of all pairs: [N, D] and [M, D] -> [N, M]."""
        return np.asarray(_unit(embeddings1) @ _unit(embeddings2).T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosine of each pair: [N, D] twice -> [N]."""
        return np.asarray((_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1))

    def _instruction(self, task_metadata: Any, prompt_type: Any) -> str | None:
        prompt = getattr(task_metadata, "prompt", None) if self.use_prompts else None
        side = getattr(prompt_type, "value", prompt_type)
        if isinstance(prompt, dict):
            return prompt.get(side)
        return prompt if side in (None, "query") else None


def _items(batch: dict[str, Any], instruction: str | None) -> list[EmbeddingInput]:
    texts, images = batch.get("text"), batch.get("image")
    count = len(texts if texts is not None else images if images is not None else [])
    items = []
    for i in range(count):
        value = {"text": texts[i] or None if texts is not None else None}
        value["image"] = images[i] if images is not None else None
        # MTEB uses a blank for a missing side; an empty text is still an input.
        if value["text"] is None and value["image"] is None:
            value["text"] = " "
        items.append(EmbeddingInput.of(value, instruction))
    return items


def _unit(vectors: Any) -> np.ndarray:
    found = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12))


def mteb_tasks(benchmark: Benchmark, folder: Path, names: Sequence[str] = ()) -> list[Any]:
    """A benchmark's tasks as MTEB retrieval tasks, for `mteb.evaluate` with any MTEB model.

    Local scope becomes MTEB's `top_ranked`: each query is ranked among its own candidates. Placeholders for images
    are removed from the texts, since other models do not support them. MTEB breaks ties by its own rule.

    Args:
        benchmark: From `load_benchmark`, with the folder.
        folder: Folder of the evaluation sets.
        names: Tasks; empty: all.

    Raises:
        UserError: for an unknown task, or inputs with several images.
    """
    chosen = benchmark.only(list(names)) if names else benchmark
    reader = TaskReader(chosen, folder)
    return [_task(task, reader[task.name], benchmark.name) for task in chosen.tasks]


def _task(task: EvalTask, queries: list[EvalQuery], benchmark_name: str) -> Any:
    mteb = _mteb()
    modalities = sorted({kind for query in queries for kind in _kinds(query)}, reverse=True)  # text first
    metric, _, cut = str(task.metric).partition("@")
    if metric not in MTEB_METRICS:
        raise UserError(f"{task.name}: MTEB has no {task.metric}")
    metadata = mteb.TaskMetadata(
        name=f"{benchmark_name}-{task.name}",
        description=f"{task.name} of {benchmark_name}: {task.meta_task}",
        dataset={"path": f"local/{benchmark_name}", "revision": task.revision or "local"},
        type="Any2AnyRetrieval" if "image" in modalities else "Retrieval",
        category=_category(queries[0]),
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=f"{MTEB_METRICS[metric]}_{cut}",
    )
    base = mteb.abstasks.AbsTaskRetrieval

    def load_data(self: Any, **kwargs: Any) -> None:
        """Sets the rows; nothing is downloaded."""
        self.dataset = {"default": {"test": split_data(queries, local=task.scope == "local")}}
        self.data_loaded = True

    return type(re.sub(r"\W", "_", metadata.name), (base,), {"metadata": metadata, "load_data": load_data})()


def split_data(queries: Sequence[EvalQuery], local: bool) -> dict[str, Any]:
    """Queries, corpus, relevance judgements and (in local scope) each query's candidates, in MTEB's format."""
    corpus: dict[EmbeddingInput, str] = {}
    judged: dict[str, dict[str, int]] = {}
    ranked: dict[str, list[str]] = {}
    for number, query in enumerate(queries):
        names = [corpus.setdefault(item, f"c{len(corpus)}") for item in query.candidates]
        gains = query.gains or (1.0,) * len(query.relevant)
        judged[f"q{number}"] = {names[i]: int(gain) for i, gain in zip(query.relevant, gains, strict=True)}
        ranked[f"q{number}"] = list(dict.fromkeys(names))
    return {
        "corpus": _dataset({name: item for item, name in corpus.items()}),
        "queries": _dataset({f"q{number}": query.query for number, query in enumerate(queries)}),
        "relevant_docs": judged,
        "top_ranked": ranked if local else None,
    }


def _dataset(items: dict[str, EmbeddingInput]) -> Any:
    from datasets import Dataset, Image

    rows: dict[str, list[Any]] = {"id": list(items)}
    if any(item.text for item in items.values()):
        rows["text"] = [PLACEHOLDER.sub("", _words(item)).strip() for item in items.values()]
    if any(item.images for item in items.values()):
        several = next((item for item in items.values() if len(item.images) > 1), None)
        if several is not None:
            raise UserError(
                f"{several.images[0]}: MTEB's tasks support one image per input, but this input has several"
            )
        rows["image"] = [{"bytes": item.images[0].read()} if item.images else None for item in items.values()]
    dataset = Dataset.from_dict(rows)
    return dataset.cast_column("image", Image()) if "image" in rows else dataset


def _words(item: EmbeddingInput) -> str:
    return " ".join(part for part in (item.instruction, item.text) if part)


def _kinds(query: EvalQuery) -> set[str]:
    sides = (query.query, *query.candidates[:1])
    return {kind for item in sides for kind, there in (("text", item.text), ("image", item.images)) if there}


def _category(query: EvalQuery) -> str:
    def side(item: EmbeddingInput) -> str:
        words = PLACEHOLDER.sub("", item.text or "").strip()
        return ("i" if item.images else "") + ("t" if words or not item.images else "")

    return f"{side(query.query)}2{side(query.candidates[0])}"
