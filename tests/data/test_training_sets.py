"""Pairs of VLM2Vec-V2's training mixture equal those of the reference training code for the same rows."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data.golden_mmeb import FOLDER, Seen, colours_of_spec, encoded, seen
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.data.mmeb.train_rows import read_train_set
from vlm2vec.data.mmeb.training_sets import SETS
from vlm2vec.data.streams import StreamedSet, streamed_sets
from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.training.config import SetSettings, load_recipe
from vlm2vec.training.recipes import find_recipe

RECORDED = {
    "colpali_train_set": "colpali_train_set",
    "visrag-indomain": "visrag-indomain",
    "video_caption_300k": "video_caption_300k.caption_retrieval",
    "video_caption_300k-video": "video_caption_300k.video_retrieval",
    "video_qa_240k": "video_qa_240k",
}
LINES = {name: SETS[name].file for name in RECORDED if name.startswith("video")}  # type: ignore[union-attr]


def read_recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "train" / f"{RECORDED.get(name, name)}.json").read_text("utf-8"))
    return content


def write_recorded(name: str, root: Path) -> dict[str, Any]:
    """Rows of a recorded set where its hub dataset has them."""
    golden = read_recorded(name)
    for path, spec in golden["pictures"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(spec))
    if name in LINES:
        file = root / "video_instruction/train/sft" / LINES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in golden["rows"]), encoding="utf-8")
        return golden
    rows = [
        {**row, "image": {"bytes": encoded(row["image"]["picture"]), "path": row["image"]["path"]}}
        for row in golden["rows"]
    ]
    (root / name / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / name / "data/train-00000-of-00001.parquet", row_group_size=4)
    return golden


def expected(golden: dict[str, Any], side: str) -> list[Seen]:
    cells = {row["image"]["path"]: row["image"]["picture"] for row in golden["rows"] if "image" in row}
    specs = {**golden["pictures"], **cells}
    return [
        (entry[f"{side}_text"], tuple(colours_of_spec(specs[path]) for path in entry[f"{side}_media"]))
        for entry in golden["expected"]
    ]


def check(golden: dict[str, Any], examples: list[TrainExample]) -> None:
    assert [seen(example.query) for example in examples] == expected(golden, "query")
    assert [seen(example.target) for example in examples] == expected(golden, "pos")


@pytest.mark.parametrize("name", RECORDED)
def test_pairs_equal_those_of_the_reference_training_code(name: str, tmp_path: Path) -> None:
    golden = write_recorded(name, tmp_path)
    assert streamed_sets(tmp_path)[name] == tmp_path
    examples = StreamedSet(tmp_path, name)
    assert len(examples) == sum(examples.blocks) == len(golden["expected"])
    check(golden, list(examples))
    assert {example.source for example in examples} == {name}


def test_pairs_of_the_image_sets_equal_those_of_the_reference_training_code(tmp_path: Path) -> None:
    golden = read_recorded("mmeb-train")
    for path, spec in golden["pictures"].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encoded(spec))
    (tmp_path / "OK-VQA").mkdir()
    table = pa.Table.from_pylist(golden["rows"]).select(list(TRAIN_COLUMNS))
    pq.write_table(table, tmp_path / "OK-VQA/original-00000-of-00001.parquet")
    examples = read_train_set(tmp_path, "OK-VQA")
    check(golden, examples)
    for example, entry in zip(examples, golden["expected"], strict=True):
        assert [seen(negative)[0] for negative in example.negatives] == entry["neg_text"]


def test_frames_in_tars_and_the_folder_of_the_hub_dataset_give_the_same_pairs(tmp_path: Path) -> None:
    inner = tmp_path / "train_video_and_instruction"
    golden = write_recorded("video_qa_240k", inner)
    with tarfile.open(inner / "train_300k/chunk_0.tar.gz", "w:gz") as archive:
        archive.add(inner / "train_300k/v1", "v1")
    for frame in (inner / "train_300k/v1").iterdir():
        frame.unlink()
    (inner / "train_300k/v1").rmdir()
    check(golden, list(StreamedSet(tmp_path, "video_qa_240k")))


def test_mistakes_name_the_file_and_what_was_expected(tmp_path: Path) -> None:
    write_recorded("video_qa_240k", tmp_path / "a")
    file = tmp_path / "a/video_instruction/train/sft" / LINES["video_qa_240k"]
    file.write_text('{"id": 1, "video": "v1", "conversations": []}\n')
    with pytest.raises(UserError, match=r"line 1: expected video, and conversations with two turns"):
        list(StreamedSet(tmp_path / "a", "video_qa_240k"))
    file.write_text('{"id": 1, "video": "v9", "conversations": []}\n')
    with pytest.raises(UserError, match=r"no video has frames in .*train_300k"):
        StreamedSet(tmp_path / "a", "video_qa_240k")
    (tmp_path / "b/visrag-indomain").mkdir(parents=True)
    pq.write_table(pa.table({"query": ["q"]}), tmp_path / "b/visrag-indomain/0.parquet")
    with pytest.raises(UserError, match=r"0\.parquet: column source is missing; expected query, source, image"):
        StreamedSet(tmp_path / "b", "visrag-indomain")


def test_a_batch_of_pages_and_videos_is_what_the_family_reads_natively(tmp_path: Path, tiny_vlm: Any) -> None:  # noqa: F811
    for name in ("colpali_train_set", "video_caption_300k-video"):
        write_recorded(name, tmp_path)
    model = Embedder.from_pretrained(str(tiny_vlm("qwen2_vl")), dtype=torch.float32)
    examples = [StreamedSet(tmp_path, name)[0] for name in ("colpali_train_set", "video_caption_300k-video")]
    batch = collate_pairs(model.backbone.process, examples)
    assert batch.inputs.rows["image_grid_thw"].tolist() == [1, 0, 0, 0]
    assert batch.inputs["video_grid_thw"][:, 0].tolist() == [4]  # eight frames, two in a patch
    assert torch.isfinite(model.backbone(batch.inputs)).all()


def test_the_recipe_names_the_whole_mixture_with_the_published_weights() -> None:
    sets = load_recipe(find_recipe("vlm2vec-v2-qwen2vl")).data.sets
    assert isinstance(sets, dict) and len(sets) == 25
    weights = {name: one.weight if isinstance(one, SetSettings) else one for name, one in sets.items()}
    total = sum(weight for weight in weights.values() if weight is not None)
    assert {name: weights[name] for name in RECORDED} == dict(zip(RECORDED, (10, 12, 5, 5, 5), strict=True))
    assert total == 52 and sum(one for name, one in weights.items() if name not in RECORDED and one) == 15
