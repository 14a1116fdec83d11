"""Sets with separate queries, corpus and judgements: the families of MMEB-V3, with their published peculiarities."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from data.layouts import corpus_rows, write_corpus_set, write_table

from vlm2vec.data.mmeb.corpora import read_corpus_set
from vlm2vec.errors import UserError

APART: dict[Any, str] = {"queries": "a/queries.jsonl", "corpus": "a/corpus.jsonl", "qrels": "a/qrels.jsonl"}
TOGETHER: dict[Any, str] = {"queries": "a/queries.parquet", "corpus": "a/corpus.parquet"}


def test_judgements_of_their_own_file_are_graded_and_titles_stand_above_texts(tmp_path: Path) -> None:
    write_corpus_set(tmp_path, "NanoBEIR/NanoNQ", APART)
    queries = read_corpus_set(tmp_path, "NanoBEIR/NanoNQ", APART)
    assert len(queries) == 12 and len({id(query.candidates) for query in queries}) == 1
    assert (queries[1].query.text, queries[1].relevant, queries[1].gains) == ("find 1", (1, 2), (2.0, 1.0))
    assert queries[2].relevant == (2,)  # a judgement of 0 is none
    assert [item.text for item in queries[0].candidates[:2]] == [
        "NanoBEIR/NanoNQ text 0",
        "Title\nNanoBEIR/NanoNQ text 1",
    ]


@pytest.mark.parametrize(("family", "asks"), [("FollowIR", "og 3 find 3"), ("InfoSearch", "changed 3 find 3")])
def test_the_instruction_that_a_family_uses_stands_before_the_query(tmp_path: Path, family: str, asks: str) -> None:
    write_corpus_set(tmp_path, f"{family}/x", APART)
    assert read_corpus_set(tmp_path, f"{family}/x", APART)[3].query.text == asks


def test_queries_that_name_their_documents_need_no_judgements(tmp_path: Path) -> None:
    write_corpus_set(tmp_path, "BRIGHT/aops", TOGETHER)
    bright = read_corpus_set(tmp_path, "BRIGHT/aops", TOGETHER)
    assert bright[4].relevant == (4, 5) and bright[4].query.text == "why 4?"
    write_corpus_set(tmp_path, "ToolDe/web/apigen", TOGETHER)
    tools = read_corpus_set(tmp_path, "ToolDe/web/apigen", TOGETHER)
    assert [query.query.text for query in tools[:2]] == ["Given a request, find the tool do 0", "do 1"]
    assert tools[0].candidates[0].text == '{"name": "ToolDe/web/apigen 0"}'


def test_products_are_their_fields_beside_the_first_image_that_is_there(tmp_path: Path) -> None:
    files: dict[Any, str] = {"queries": "m/query.jsonl", "corpus": "m/candidates.jsonl"}
    write_corpus_set(tmp_path, "MCMR", files)
    queries = read_corpus_set(tmp_path, "MCMR", files)
    product = queries[0].candidates[0]
    assert queries[0].query.text == "Find an image-text pair that matches the given query lamp 0"
    assert product.text == "<|image_1|>  title: lamp 0\ndescription: red\nprice: 9.5"
    assert [Path(str(image.path)).name for image in product.images] == ["p_0.png"] and product.images[0].exists()


def test_queries_without_an_answer_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus_set(tmp_path, "R2MED/x", APART)
    write_table(tmp_path / APART["qrels"], corpus_rows("R2MED/x")["qrels"][3:12])
    with caplog.at_level(logging.WARNING):
        assert len(read_corpus_set(tmp_path, "R2MED/x", APART)) == 9
    assert "R2MED/x: 3 queries have no relevant document and are left out" in caplog.text


@pytest.mark.parametrize(
    ("part", "row", "problem"),
    [
        ("qrels", {"query-id": "q0", "corpus-id": "gone", "score": 1}, r"document gone is not in .*corpus\.jsonl"),
        ("qrels", {"query-id": "q0", "corpus-id": "d0", "score": "high"}, "line 1: field score is not a number"),
        ("queries", {"text": "x"}, "line 1: expected one of _id, id, qid"),
        ("corpus", {"text": "x"}, "line 1: expected one of _id, id, doc_id"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, part: str, row: dict[str, object], problem: str) -> None:
    write_corpus_set(tmp_path, "LongEmbed/needle", APART)
    write_table(tmp_path / APART[part], [row])
    with pytest.raises(UserError, match=problem):
        read_corpus_set(tmp_path, "LongEmbed/needle", APART)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.jsonl: not found; `vlm2vec data check` prints how to download it"):
        read_corpus_set(tmp_path, "LongEmbed/needle", APART)
