"""Vector stores: the same calls give the same results with every database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.errors import UserError
from vlm2vec.retrieval.metadata import THUMBNAIL, column_name
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore

FACTS = StoreFacts("toy", "abc", 16, about={"weights": "1", "template": "2"})
NUM = 120
ADDRESSES = ["{folder}/photos.lance", "qdrant://{folder}/qdrant/photos"]
pytestmark = pytest.mark.filterwarnings("ignore:Local mode")


def unit_rows(num: int, seed: int, dim: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


KEYS = [f"it's/{i}.png" for i in range(NUM)]
VECTORS = unit_rows(NUM, 0)
METADATA = [
    {
        "width": i % 10,
        "ratio": None if i % 3 else i / 8,
        "kind": ("page", "photo", None)[i % 4 - 1] if i % 4 else "o'clock",
        "colour": i % 2 == 0,
    }
    for i in range(NUM)
]


def filled(uri: str) -> VectorStore:
    store = open_store(uri, FACTS)
    store.upsert(KEYS, VECTORS, METADATA)
    return store


@pytest.fixture(params=ADDRESSES, ids=["lance", "qdrant"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.param.format(folder=tmp_path)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[VectorStore]:
    folder = tmp_path_factory.mktemp("stores")
    return [filled(address.format(folder=folder)) for address in ADDRESSES]


def test_search_is_the_exact_order_of_cosines(both: list[VectorStore]) -> None:
    for query in unit_rows(5, 1):
        cosines = VECTORS @ query
        order = np.argsort(-cosines)[:10]
        for store in both:
            hits = store.search(query, 10)
            assert [hit.key for hit in hits] == [KEYS[i] for i in order]
            assert np.allclose([hit.score for hit in hits], cosines[order], atol=1e-5)
            expected = [{name: x for name, x in METADATA[i].items() if x is not None} for i in order]
            assert [hit.metadata for hit in hits] == expected


COMPARISONS = st.one_of(
    st.builds(
        "{} {} {}".format,
        st.sampled_from(["width", "ratio"]),
        st.sampled_from(["=", "<>", "<", "<=", ">", ">="]),
        st.integers(-1, 11) | st.sampled_from([0.5, 3.0, 4.125]),
    ),
    st.builds("{} {} 'page'".format, st.just("kind"), st.sampled_from(["=", "!="])),
    st.builds("kind {}IN ('photo', 'o''clock')".format, st.sampled_from(["", "NOT "])),
    st.builds("width {}IN (1, 2, 5)".format, st.sampled_from(["", "NOT "])),
    st.builds("{} IS {}NULL".format, st.sampled_from(["ratio", "kind"]), st.sampled_from(["", "NOT "])),
    st.builds("ratio {}BETWEEN 2 AND {}".format, st.sampled_from(["", "NOT "]), st.integers(3, 12)),
    st.sampled_from(["colour", "colour = false", "3 < width", "colour <> true"]),
)
CONDITIONS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["AND", "OR"]), inner),
        st.builds("NOT ({})".format, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=60)
@given(where=CONDITIONS)
def test_a_filter_selects_the_same_rows_in_every_store(both: list[VectorStore], where: str) -> None:
    lance, qdrant = (sorted(key for rows in store.scan([], where) for key in rows.keys) for store in both)
    assert lance == qdrant
    assert both[0].count(where) == both[1].count(where) == len(lance)


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("width >", ["width >"]),
        ("sky = 3", ["sky", "metadata of", "width"]),
        ("sky = 3 AND width = 2", ["sky"]),
    ],
)
def test_a_filter_that_cannot_be_is_refused_in_one_line(both: list[VectorStore], where: str, parts: list[str]) -> None:
    for store in both:
        with pytest.raises(UserError) as refused:
            store.search(VECTORS[0], 3, where)
        for part in parts:
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "where", ["kind LIKE 'p%'", "width + 1 = 3", "kind < 'b'", "lower(kind) = 'page'", "t.width = 3"]
)
def test_what_qdrant_cannot_say_is_refused_and_not_approximated(both: list[VectorStore], where: str) -> None:
    with pytest.raises(UserError, match="has no counterpart in Qdrant"):
        both[1].search(VECTORS[0], 3, where)


def test_rows_are_replaced_by_key_removed_and_fetched_in_order(uri: str) -> None:
    store = filled(uri)
    store.upsert(KEYS[:2], VECTORS[2:4], [{"width": 77, "note": "new"}, {"width": 2.5}])
    assert store.count() == NUM
    rows = store.fetch([KEYS[1], "absent", KEYS[0]], ["width"], vectors=True)
    assert rows.keys == [KEYS[1], KEYS[0]]
    assert rows.metadata == [{"width": 2.5}, {"width": 77}]
    assert rows.vectors_ND is not None and np.allclose(rows.vectors_ND, VECTORS[[3, 2]], atol=1e-6)
    assert store.search(VECTORS[2], 1)[0].score > 0.999
    store.delete([*KEYS[5:9], "absent"])
    assert sorted(key for rows in store.scan([]) for key in rows.keys) == sorted([*KEYS[:5], *KEYS[9:]])
    assert store.fields() == {"width": "number", "ratio": "number", "kind": "text", "colour": "truth", "note": "text"}
    store.close()


def test_kept_images_are_given_only_when_asked_for(uri: str) -> None:
    store = open_store(uri, FACTS)
    store.upsert(["a"], VECTORS[:1], [{THUMBNAIL: b"\x89PNG", "path": "a.png"}])
    assert store.search(VECTORS[0], 1)[0].metadata == {"path": "a.png"}
    assert [rows.metadata for rows in store.scan()] == [[{"path": "a.png"}]]
    assert store.fetch(["a"], [THUMBNAIL]).metadata == [{THUMBNAIL: b"\x89PNG"}]
    store.close()


def test_odd_names_and_values_are_kept_as_plain_ones(uri: str) -> None:
    store = open_store(uri, FACTS)
    odd = {"key": "k", "page no.": np.int64(3), "2nd": [1, "a"], "large": 2**60, "gone": float("nan")}
    store.upsert(["a"], VECTORS[:1], [odd])
    names = {name: column_name(name) for name in odd}
    plain = {names["key"]: "k", names["page no."]: 3, names["2nd"]: '[1, "a"]', "large": str(2**60)}
    assert store.search(VECTORS[0], 1)[0].metadata == plain
    assert store.count(f"large = '{2**60}'") == 1
    store.close()


def test_a_store_opens_again_with_its_facts_and_refuses_another_model(uri: str) -> None:
    filled(uri).close()
    store = open_store(uri)
    assert store.facts == FACTS and store.count() == NUM
    store.close()
    other = replace(FACTS, model="other", fingerprint="xyz", about={"weights": "9", "template": "2"})
    with pytest.raises(UserError, match="made with toy and cannot be used with other: another weights; use the"):
        open_store(uri, other)
    with pytest.raises(UserError, match="16 dimensions in float32, not 8 in float32"):
        open_store(uri, replace(FACTS, dim=8))
    with pytest.raises(UserError, match="instruction None, not 'Find'"):
        open_store(uri, replace(FACTS, instruction="Find"))


def test_float16_takes_half_the_bytes_and_hardly_changes_scores(tmp_path: Path) -> None:
    vectors = unit_rows(2000, 3, dim=256)
    sizes, scores = [], []
    for precision in ("float32", "float16"):
        facts = replace(FACTS, dim=256, precision=precision)
        store = open_store(f"{tmp_path}/{precision}.lance", facts)
        store.upsert([str(i) for i in range(2000)], vectors, [{}] * 2000)
        scores.append([hit.score for hit in store.search(vectors[7], 20)])
        sizes.append(sum(path.stat().st_size for path in (tmp_path / f"{precision}.lance").rglob("*.lance")))
    assert sizes[1] < 0.6 * sizes[0]
    assert np.allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("kind", ["IVF_RQ", "IVF_PQ", "IVF_HNSW_SQ"])
def test_an_index_finds_the_nearest_and_keeps_true_scores(kind: str, tmp_path: Path) -> None:
    vectors = unit_rows(3000, 4, dim=64)
    store = open_store(f"{tmp_path}/many.lance", replace(FACTS, dim=64))
    store.upsert([str(i) for i in range(3000)], vectors, [{"even": i % 2 == 0} for i in range(3000)])
    assert store.build_index().kind == "exact"
    assert store.build_index(kind).kind == kind
    for i in (5, 50, 500):
        best = store.search(vectors[i], 5)
        assert best[0].key == str(i) and abs(best[0].score - 1) < 1e-5
        exact = store.search(vectors[i], 5, exact=True)
        assert [hit.key for hit in exact] == [str(j) for j in np.argsort(-(vectors @ vectors[i]))[:5]]
        assert all(hit.metadata["even"] for hit in store.search(vectors[i], 5, "even"))
    store.upsert(["late"], -vectors[:1], [{}])
    assert store.search(-vectors[0], 1)[0].key == "late", "rows after the index are found, too"
    assert open_store(store.uri).search(vectors[9], 1)[0].key == "9"
    assert store.build_index("exact").kind == "exact"
    with pytest.raises(UserError, match="index 'tree': expected one of exact, IVF_RQ"):
        store.build_index("tree")


def test_many_rows_get_the_index_that_can_keep_their_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vec.retrieval.vector_store.EXACT_BELOW", 1000)
    for dim, kind in ((64, "IVF_RQ"), (20, "IVF_HNSW_SQ")):
        vectors = np.repeat(unit_rows(60, 4, dim=dim), 20, axis=0) + 0.8 * unit_rows(
            1200, 5, dim=dim
        )  # near by twenties
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        store = open_store(f"{tmp_path}/{dim}.lance", replace(FACTS, dim=dim))
        store.upsert([str(i) for i in range(1200)], vectors, [{}] * 1200)
        chosen = store.build_index()
        assert (chosen.kind, chosen.reason) == (kind, "1,200 rows, 1,000 or more")
        truth = [{str(j) for j in np.argsort(-(vectors @ query))[:10]} for query in vectors[:20]]
        found = [{hit.key for hit in store.search(query, 10)} for query in vectors[:20]]
        assert np.mean([len(one & true) / 10 for one, true in zip(found, truth, strict=True)]) > 0.9
    with pytest.raises(UserError, match="index 'IVF_RQ': expected one of exact, IVF_HNSW_SQ, IVF_PQ"):
        store.build_index("IVF_RQ")


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("photos", "expected FOLDER.lance or qdrant://host:port/collection"),
        ("{folder}/none.lance", "no such store; make it with: vlm2vec index"),
        ("{folder}/empty.lance", "not a LanceDB table"),
        ("qdrant://x", "expected qdrant://host:port/collection"),
        ("qdrant://host:port/x", "expected qdrant://host:port/collection"),
        ("qdrant://{folder}/none/photos", "no such store"),
        ("qdrant://127.0.0.1:9/photos", "no Qdrant server answers there"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line_and_makes_nothing(uri: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "empty.lance").mkdir()
    with pytest.raises(UserError, match=part):
        open_store(uri.format(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.lance"]


KILLED = """
import os, signal, sys
import numpy as np
from vlm2vec.retrieval.metadata import THUMBNAIL, column_name
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts
store = open_store(sys.argv[1], StoreFacts("toy", "abc", 16))
for part in range(100):
    store.upsert([f"{part}-{i}" for i in range(50)], np.eye(50, 16, dtype=np.float32) + 0.1, [{"part": part}] * 50)
    print(part, flush=True)
"""


def test_a_process_killed_while_writing_loses_nothing_that_was_written(tmp_path: Path) -> None:
    uri = f"{tmp_path}/photos.lance"
    with subprocess.Popen([sys.executable, "-c", KILLED, uri], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.strip() == "7":
                os.kill(writer.pid, signal.SIGKILL)
                break
    store = open_store(uri)
    parts = [row["part"] for rows in store.scan(["part"]) for row in rows.metadata]
    assert set(parts) >= set(range(8))
    assert all(parts.count(part) == 50 for part in set(parts))
    store.upsert(["more"], np.ones((1, 16)) / 4, [{"part": -1}])
    assert store.count() == len(parts) + 1


def test_a_search_probes_half_of_the_partitions_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm2vec.retrieval.lance_store.PARTITION_ROWS", 15)
    vectors = np.repeat(unit_rows(150, 4, dim=32), 20, axis=0) + 0.5 * unit_rows(3000, 5, dim=32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = open_store(f"{tmp_path}/many.lance", replace(FACTS, dim=32))
    store.add([str(i) for i in range(3000)], vectors, [{}] * 3000)
    store.build_index("IVF_RQ")
    assert store._probes == open_store(store.uri)._probes == 100  # type: ignore[attr-defined]
    truth = [{str(j) for j in np.argsort(-(vectors @ query))[:10]} for query in vectors[:100]]
    found = [{hit.key for hit in store.search(query, 10)} for query in vectors[:100]]
    assert np.mean([len(one & true) / 10 for one, true in zip(found, truth, strict=True)]) >= 0.99
