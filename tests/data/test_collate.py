from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm2vec import EmbeddingInput
from vlm2vec.batch import Batch
from vlm2vec.data.collate import PairBatch, collate_pairs
from vlm2vec.data.examples import TrainExample


def letters(inputs: Sequence[EmbeddingInput]) -> Batch:
    """A processor: the text's letters."""
    return Batch({"input_ids": torch.tensor([[ord((item.text or " ")[0])] for item in inputs])})


def pair(query: str, target: str, *negatives: str, target_id: str | None = None) -> TrainExample:
    others = tuple(EmbeddingInput(text) for text in negatives)
    return TrainExample(EmbeddingInput(query), EmbeddingInput(target), others, "set", target_id, f"file, row {query}")


def words(batch: PairBatch, rows: torch.Tensor) -> str:
    return "".join(chr(int(batch.inputs["input_ids"][row, 0])) for row in rows)


EXAMPLES = [pair("a", "x", "z"), pair("b", "x"), pair("a", "y", "z", "x"), pair("y", "y")]


def test_equal_inputs_of_a_side_are_one_row_and_everyone_finds_his_own() -> None:
    batch = collate_pairs(letters, EXAMPLES)
    assert words(batch, batch.query_rows) == "abay"
    assert words(batch, batch.target_rows) == "xxyyzzx"
    assert len(batch.inputs) == 3 + 3  # a b y | x y z: a query that equals its target stays a view of its own
    assert batch.origins == [f"file, row {name}" for name in "abay"]


def test_without_merging_every_input_has_its_row() -> None:
    batch = collate_pairs(letters, EXAMPLES, merge_equal=False)
    assert len(batch.inputs) == 4 + 7
    assert words(batch, batch.query_rows) == "abay"
    assert words(batch, batch.target_rows) == "xxyyzzx"


def test_equal_contents_share_a_key_and_others_do_not() -> None:
    keys = collate_pairs(letters, EXAMPLES).target_keys.tolist()
    assert [keys.index(key) for key in keys] == [0, 0, 2, 2, 4, 4, 0]


def test_the_datas_own_ids_stand_for_the_content_where_given() -> None:
    examples = [pair("a", "x", target_id="7"), pair("b", "y", target_id="7"), pair("c", "x")]
    batch = collate_pairs(letters, examples)
    ids = batch.target_ids.tolist()
    assert ids[0] == ids[1] != ids[2] == batch.target_keys[2]
    assert batch.target_keys[0] != batch.target_keys[1]
