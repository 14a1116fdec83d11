"""The adapters with the real libraries: vectors equal the library's, and a search finds the image with its colour."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from haystack import Document, Pipeline
from haystack.components.retrievers import InMemoryEmbeddingRetriever
from haystack.dataclasses import ByteStream
from haystack.document_stores.in_memory import InMemoryDocumentStore
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from PIL import Image
from samples import COLORS, draw

from vlm2vec import Embedder, UserError
from vlm2vec.integrations.haystack import VLM2VecDocumentEmbedder, VLM2VecTextEmbedder
from vlm2vec.integrations.lancedb import VLM2VecFunction
from vlm2vec.integrations.langchain import VLM2VecEmbeddings
from vlm2vec.integrations.llamaindex import VLM2VecEmbedding

TEXTS = ["a red car", "a dog on the beach", "Zürich"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    """The built-in model in its smallest size, with different prompts for queries and documents."""
    made = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    made.prompts = {"query": "Find it:", "document": "Keep it:"}
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for i, color in enumerate(COLORS):
        draw(folder / f"{color}.png", color, i)
    return sorted(folder.glob("*.png"))


def same(made: Any, want: np.ndarray) -> None:
    assert np.array(made).shape == want.shape
    assert (np.array(made) * want).sum(axis=-1) == pytest.approx(1.0, abs=1e-4)


def test_langchain_gets_the_vectors_of_the_library(embedder: Embedder, images: list[Path]) -> None:
    model = VLM2VecEmbeddings(embedder)
    same(model.embed_documents(TEXTS), embedder.encode_document(TEXTS))
    same(model.embed_query(TEXTS[0]), embedder.encode_query(TEXTS[:1])[0])
    same(asyncio.run(model.aembed_query(TEXTS[0])), embedder.encode_query(TEXTS[:1])[0])
    same(model.embed_image([str(path) for path in images]), embedder.encode_document(images))
    store = InMemoryVectorStore(model)
    store.add_texts(TEXTS)
    assert len(store.similarity_search("a red car", k=2)) == 2
    assert len(VLM2VecEmbeddings(embedder, truncate_dim=64).embed_query("a")) == 64


def test_a_single_text_in_place_of_a_list_is_not_taken_for_its_letters(embedder: Embedder) -> None:
    model = VLM2VecEmbeddings(embedder)
    for method in (model.embed_documents, model.embed_image):
        with pytest.raises(UserError, match="expects a list of inputs, found a red car of type str"):
            method("a red car")


def test_llamaindex_gets_the_vectors_of_the_library(embedder: Embedder, images: list[Path]) -> None:
    model = VLM2VecEmbedding(embedder, embed_batch_size=2)
    same(model.get_text_embedding_batch(TEXTS), embedder.encode_document(TEXTS))
    same(model.get_query_embedding(TEXTS[0]), embedder.encode_query(TEXTS[:1])[0])
    want = embedder.encode_document(images)
    same(model.get_image_embedding_batch([str(path) for path in images]), want)
    same(model.get_image_embedding(io.BytesIO(images[0].read_bytes())), want[0])
    same(asyncio.run(model.aget_image_embedding_batch([str(path) for path in images])), want)
    same(asyncio.run(model.aget_text_embedding_batch(TEXTS)), embedder.encode_document(TEXTS))
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=model)
    found = index.as_retriever(similarity_top_k=3).retrieve("a red car")
    assert {hit.node.get_content() for hit in found} == set(TEXTS)
    best = embedder.encode_query(["a red car"]) @ embedder.encode_document(TEXTS).T
    assert found[0].score == pytest.approx(best.max(), abs=1e-4)


def test_haystack_gets_the_vectors_of_the_library(embedder: Embedder, images: list[Path]) -> None:
    blobs = [Document(blob=ByteStream(path.read_bytes(), mime_type="image/png")) for path in images]
    paths = [Document(meta={"file_path": str(path)}) for path in images]
    both = Document(content="in red", blob=blobs[0].blob, meta={"file_path": "not used"})
    made = VLM2VecDocumentEmbedder(embedder).run([*map(Document, ["a", "b"], TEXTS), *blobs, *paths, both])["documents"]
    want = [*embedder.encode_document(TEXTS[:2]), *embedder.encode_document([*images, *images])]
    same([each.embedding for each in made[:-1]], np.array(want))
    same(made[-1].embedding, embedder.encode_document([{"text": "in red", "image": images[0]}])[0])
    query = VLM2VecTextEmbedder(embedder)
    same(query.run(text=TEXTS[0])["embedding"], embedder.encode_query(TEXTS[:1])[0])
    given = {"text": "in blue", "image": str(images[0])}
    same(query.run(**given)["embedding"], embedder.encode_query([{"text": "in blue", "image": images[0]}])[0])


def test_a_haystack_pipeline_finds_images_and_is_the_same_after_yaml(embedder: Embedder, images: list[Path], tmp_path):
    folder = str(embedder.save_pretrained(tmp_path / "model"))
    store = InMemoryDocumentStore()
    store.write_documents(
        VLM2VecDocumentEmbedder(embedder).run([Document(meta={"file_path": str(path)}) for path in images])["documents"]
    )
    text = VLM2VecTextEmbedder(folder, truncate_dim=None, device="cpu")
    saved = Pipeline()
    saved.add_component("text", text)
    again = Pipeline.loads(saved.dumps(), allowed_modules=["vlm2vec.integrations.haystack"])
    again.add_component("find", InMemoryEmbeddingRetriever(store, top_k=4))
    again.connect("text.embedding", "find.query_embedding")
    found = again.run({"text": {"text": "something red"}})["find"]["documents"]
    scores = (embedder.encode_query(["something red"]) @ embedder.encode_document(images).T)[0]
    assert [each.meta["file_path"] for each in found] == [str(images[i]) for i in np.argsort(-scores, kind="stable")]


def test_lancedb_embeds_rows_and_queries_and_again_after_opening_the_table(
    embedder: Embedder, images: list[Path], tmp_path: Path
) -> None:
    embedder.save_pretrained(tmp_path / "model")
    function = get_registry().get("vlm2vec").create(name=str(tmp_path / "model"), source="image", device="cpu")

    class Photo(LanceModel):
        path: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path / "db").create_table("photos", schema=Photo)
    table.add([{"path": str(path)} for path in images])
    stored = table.to_arrow()
    same(stored["vector"].to_pylist(), embedder.encode_document([Path(p) for p in stored["path"].to_pylist()]))
    again = lancedb.connect(tmp_path / "db").open_table("photos")
    with Image.open(images[0]) as image:
        assert again.search(image.convert("RGB")).limit(1).to_list()[0]["path"] == str(images[0])
    scores = embedder.encode_query(["something red"]) @ embedder.encode_document(images).T
    nearest = again.search("something red").distance_type("cosine").limit(4).to_list()
    assert [row["path"] for row in nearest] == [str(images[i]) for i in np.argsort(-scores[0], kind="stable")]


def test_lancedb_reads_texts_bytes_and_missing_values(
    embedder: Embedder, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Embedder, "from_pretrained", lambda name, **_: embedder)
    function = VLM2VecFunction.create(name="any")
    first, missing, image = function.compute_source_embeddings(["a red car", None, images[0].read_bytes()])
    assert missing is None
    same(first, embedder.encode_document(["a red car"])[0])
    same(image, embedder.encode_document([images[0]])[0])
    both = {"text": "in blue", "image": images[0]}
    same(function.compute_query_embeddings(both)[0], embedder.encode_query([both])[0])


def test_a_haystack_document_without_content_is_an_error(embedder: Embedder) -> None:
    with pytest.raises(UserError, match="empty"):
        VLM2VecDocumentEmbedder(embedder).run([Document()])


def test_an_unreadable_image_is_an_error_of_the_library(embedder: Embedder, tmp_path: Path) -> None:
    for model in (VLM2VecEmbeddings(embedder).embed_image, VLM2VecEmbedding(embedder).get_image_embedding_batch):
        with pytest.raises(UserError, match="missing"):
            model([str(tmp_path / "none.png")])
        with pytest.raises(UserError, match="URL"):
            model(["https://example.org/a.png"])
