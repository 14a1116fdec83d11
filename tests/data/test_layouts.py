"""Reading the published layouts: bytes of prompts, identities of candidates, frames, judgements."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from data.layouts import draw_image, instruct_row, write_image_set, write_rows, write_video_set, write_visdoc_set

from vlm2vec import UserError
from vlm2vec.data.mmeb.documents import read_visdoc_set
from vlm2vec.data.mmeb.images import read_eval_set
from vlm2vec.data.mmeb.instruct import prompts_of
from vlm2vec.data.mmeb.media import Media, sample_frames
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.data.mmeb.videos import read_video_set
from vlm2vec.data.records import read_eval_records, read_train_records
from vlm2vec.evaluation.benchmark import EvalTask
from vlm2vec.evaluation.tasks import read_task
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef

T = "<|image_1|>"


# What the reference loaders build, written out by hand from their rules.
@pytest.mark.parametrize(
    ("kind", "row", "query", "target"),
    [
        (
            "image_cls",
            {"qry_inst": f"{T}\nName it\n", "qry_text": ""},
            f"{T}\n\nName it\n\n".replace("\n\n", "\n", 1),
            "a",
        ),
        ("image_cls", {"qry_inst": f"{T} Name it", "qry_text": "in red"}, f"{T}  Name it in red\n", "a"),
        ("image_i2t", {"qry_inst": f"{T} Find a caption.", "qry_text": ""}, f"{T}  Find a caption.\n", "a"),
        ("image_qa", {"qry_inst": f"{T} Answer:", "qry_text": "who? "}, f"{T}\nAnswer: who? \n", "a"),
        ("image_i2i_vg", {"qry_inst": f"{T} Crop", "qry_text": "x"}, f"{T}\nCrop x\n", f"{T}  Show a\n"),
        ("image_t2i", {"qry_inst": "Find", "qry_text": "x"}, "Find x\n", f"{T}  Show a\n"),
    ],
)
def test_prompts_of_the_later_layout_have_the_published_bytes(
    kind: str, row: dict[str, str], query: str, target: str
) -> None:
    whole = {"tgt_inst": f"{T} Show", "tgt_text": ["a"], "tgt_img_path": ["p.png"], **row}
    prompts = prompts_of(kind, whole, "Set")  # type: ignore[arg-type]
    assert (prompts.query, prompts.targets) == (query, [target])


def test_targets_without_text_end_in_a_line_break_in_text_to_image_sets_only() -> None:
    row = {"qry_inst": "Find", "qry_text": "x", "tgt_inst": f"{T} Show.", "tgt_text": [" "], "tgt_img_path": ["p"]}
    assert prompts_of("image_t2i", row, "Set").targets == [f"{T}  Show.\n"]
    assert prompts_of("image_i2i_vg", row, "Set").targets == [f"{T}  Show."]


def test_visdials_query_ends_in_a_second_line_break() -> None:
    row = instruct_row("image_t2i", 0)
    assert prompts_of("image_t2i", row, "VisDial").query == prompts_of("image_t2i", row, "CIRR").query + "\n"


def test_spaces_commas_and_missing_stops_come_through_as_published(tmp_path: Path) -> None:
    write_image_set(tmp_path, "ChartQA", "image_qa", with_instructions=False)
    query = read_eval_set(tmp_path, "ChartQA", "image_qa")[0]
    assert query.query.text.endswith("what is 0? ")
    assert query.candidates[0].text == "ChartQA label 0, comma list "
    assert len(query.candidates) == 12 and query.relevant == (0,)


def test_captions_beside_one_image_collapse_to_the_first_unless_content_counts(tmp_path: Path) -> None:
    draw_image(tmp_path / "MMEB/p.png", 1)
    row = {"qry_inst": "Find", "qry_text": "x", "qry_img_path": "", "tgt_inst": f"{T} Show"}
    rows = [{**row, "tgt_text": ["one", "two"], "tgt_img_path": ["MMEB/p.png"] * 2}]
    write_rows(tmp_path / "WebQA/test-00000-of-00001.parquet", rows)
    published = read_eval_set(tmp_path, "WebQA", "image_t2i")[0]
    assert published.candidates[0] is published.candidates[1]
    content = read_eval_set(tmp_path, "WebQA", "image_t2i", Quirks(identity="content"))[0]
    assert [item.text for item in content.candidates] == [f"{T}  Show one\n", f"{T}  Show two\n"]
    grounding = read_eval_set(tmp_path, "WebQA", "image_i2i_vg")[0]
    assert grounding.candidates[0] != grounding.candidates[1]  # RefCOCO-Matching: image and caption


def test_plain_prompts_leave_the_writing_to_the_template(tmp_path: Path) -> None:
    write_image_set(tmp_path, "OK-VQA", "image_qa", with_instructions=True)
    query = read_eval_set(tmp_path, "OK-VQA", "image_qa", Quirks(whitespace="plain"))[3]
    assert query.query.text == "what is 3?"
    assert query.query.instruction == "Represent the given image with the following question:"


def test_a_token_without_an_image_can_be_taken_out_of_the_later_layout_too(tmp_path: Path) -> None:
    row = {"qry_inst": f"{T} Find an answer:", "qry_text": "who", "qry_img_path": "", "tgt_inst": ""}
    write_rows(tmp_path / "EDIS/test-0.parquet", [{**row, "tgt_text": ["a"], "tgt_img_path": [""]}])
    removed = read_eval_set(tmp_path, "EDIS", "image_t2i", Quirks(missing_image="removed"))
    assert removed[0].query.text == "Find an answer: who\n"


def test_images_of_archives_are_found_with_folders_more_or_less(tmp_path: Path) -> None:
    file = draw_image(tmp_path / "x.png", 3)
    (tmp_path / "data/image-tasks").mkdir(parents=True)
    with tarfile.open(tmp_path / "data/image-tasks/mmeb_v1.tar.gz", "w:gz") as tar:
        tar.add(file, "MMEB/A/x.png")
    with zipfile.ZipFile(tmp_path / "data/more.zip", "w") as archive:
        archive.write(file, "B/y.png")
    media = Media(tmp_path / "data")
    for path in ("A/x.png", "MMEB/A/x.png", "images/B/y.png"):
        assert media.image(path).load().size == (12, 9)
    assert not media.image("A/none.png").exists()


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (5, 5), 100).save(tmp_path / "grey.png")
    assert ImageRef(path=str(tmp_path / "grey.png")).load().getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("inside", [True, False])
def test_documents_share_one_corpus_and_have_graded_judgements(tmp_path: Path, inside: bool) -> None:
    write_visdoc_set(tmp_path, "ViDoRe_docvqa", images_inside=inside)
    queries = read_visdoc_set(tmp_path, "ViDoRe_docvqa", quirks=Quirks(pixels="library"))
    assert len(queries) == 12 and len({id(query.candidates) for query in queries}) == 1
    assert (queries[0].relevant, queries[0].gains) == ((0, 1), (1.0, 2.0))  # the judgement of 0 is none
    assert queries[1].query.text == "Find a document image that matches the given query: where is 1?"
    assert queries[0].candidates[3].images[0].load().size == ((10, 14) if inside else (12, 9))
    assert len(read_visdoc_set(tmp_path, "ViDoRe_docvqa", "french")) == 6


def test_a_judgement_of_an_unknown_document_is_named(tmp_path: Path) -> None:
    write_visdoc_set(tmp_path, "X")
    write_rows(tmp_path / "X/qrels/test-00000-of-00001.parquet", [{"query-id": 0, "corpus-id": 99, "score": 1}])
    with pytest.raises(UserError, match="row 0: corpus-id 99 is not in the corpus"):
        read_visdoc_set(tmp_path, "X")


def test_videos_are_their_frames_at_equal_distances(tmp_path: Path) -> None:
    write_video_set(tmp_path, "MVBench", num_frames=12)
    query = read_video_set(tmp_path, "MVBench", Quirks(frames=4))[1]
    frames = query.query.video.sample(8).images
    assert [Path(frame.path).stem for frame in frames] == ["frame_0", "frame_3", "frame_7", "frame_11"]
    assert query.query.text.startswith("<|video_1|> Given a video and a question")
    assert query.query.text.endswith("how many\nOptions:\n(A) answer 0\n(B) answer 1\n(C) answer 2")
    assert [item.text for item in query.candidates] == ["(A) answer 0", "(B) answer 1", "(C) answer 2"]
    assert query.relevant == (1,)
    frames = [ImageRef(path=str(i)) for i in range(3)]
    assert sample_frames(frames, 8) == frames and sample_frames(frames, 1) == frames[:1]


def test_frames_in_a_tar_with_its_extra_folder_are_read_in_number_order(tmp_path: Path) -> None:
    write_video_set(tmp_path / "made", "MSVD", num_frames=11)
    frames = tmp_path / "made/video-tasks/frames"
    with tarfile.open(tmp_path / "video_ret.tar", "w") as tar:
        tar.add(frames / "video_ret", "video_ret")
    (tmp_path / "read/video-tasks/frames").mkdir(parents=True)
    (tmp_path / "video_ret.tar").rename(tmp_path / "read/video-tasks/frames/video_ret.tar")
    (tmp_path / "made/MSVD").rename(tmp_path / "read/MSVD")
    queries = read_video_set(tmp_path / "read", "MSVD", Quirks(frames=11))
    names = [Path(frame.member).stem for frame in queries[2].candidates[2].video.frames]
    assert names == [f"frame_{i}" for i in range(11)]
    assert queries[2].query.text == "Find the video snippet that corresponds to the given summary: scene 2"
    assert len({id(query.candidates) for query in queries}) == 1 and queries[5].relevant == (5,)


def test_a_video_without_frames_and_a_gold_that_is_no_candidate_are_named(tmp_path: Path) -> None:
    write_video_set(tmp_path, "EgoSchema", num_frames=1)
    for file in (tmp_path / "video-tasks/frames/video_qa/EgoSchema/vid_3").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"row 3: no frames in .*vid_3"):
        read_video_set(tmp_path, "EgoSchema", Quirks())
    write_rows(tmp_path / "ActivityNetQA/a.parquet", [{"video_name": "a", "question": "q", "answer": "maybe"}])
    with pytest.raises(UserError, match="row 0: the answer 'maybe' is not among"):
        read_video_set(tmp_path, "ActivityNetQA", Quirks())


def test_class_names_come_from_labels_txt(tmp_path: Path) -> None:
    write_video_set(tmp_path, "HMDB51", num_frames=1)
    (tmp_path / "HMDB51/labels.txt").write_text("\n".join(f"answer {i}" for i in range(9)) + "\n")
    assert len(read_video_set(tmp_path, "HMDB51", Quirks())[0].candidates) == 9


def test_json_lines_parquet_and_shards_of_ones_own_are_the_same_records(tmp_path: Path) -> None:
    file = draw_image(tmp_path / "q.png", 5)
    record = {"query": {"text": "which", "image": "q.png", "instruction": "Answer"}, "target": "this"}
    negatives = {"negatives": [{"text": "that"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({**record, **negatives}) + "\n")
    flat = {"query_text": "which", "query_instruction": "Answer", "target_text": "this", "negative_text": "that"}
    write_rows(tmp_path / "a.parquet", [{**flat, "query_image": {"bytes": file.read_bytes(), "path": None}}])
    (tmp_path / "r.json").write_text(json.dumps({**record, **negatives}))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "r.json", "0001.json")
        tar.add(file, "0001.q.png")
    found = [read_train_records(tmp_path / f"a.{ending}")[0] for ending in ("jsonl", "parquet", "tar")]
    for example in found:
        assert (example.query.text, example.query.instruction, example.target.text) == ("which", "Answer", "this")
        assert example.negatives[0].text == "that"
        assert example.query.images[0].digest() == found[0].query.images[0].digest()


def test_a_video_of_a_record_is_a_folder_of_frames_a_file_or_a_list_of_images(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    frames = [draw_image(tmp_path / f"clip/{i}.png", i) for i in range(3)]
    sides = [{"text": "what", "video": video} for video in ("clip", "clip.mp4", [f"clip/{i}.png" for i in (2, 0)])]
    rows = [{"query": side, "target": "this", "negatives": [{"video": "clip"}]} for side in sides]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder, file, images = read_train_records(tmp_path / "a.jsonl")
    assert folder.query.video.sample(8).images == [ImageRef(path=str(frame)) for frame in frames]
    assert file.query.video == VideoRef(path=str(tmp_path / "clip.mp4")) and file.negatives[0].video.path
    assert [Path(frame.path).name for frame in images.query.video.frames] == ["2.png", "0.png"]
    (tmp_path / "b.jsonl").write_text('{"query": {"video": 3}, "target": "this"}')
    with pytest.raises(UserError, match="line 1, field query: expected a video path or a list of frames, found 3"):
        read_train_records(tmp_path / "b.jsonl")


def test_queries_of_ones_own_have_candidates_and_grades(tmp_path: Path) -> None:
    row = {"query": "q", "candidates": ["a", "b", {"text": "c"}], "relevant": [2, 0], "gains": [2, 1]}
    (tmp_path / "Mine").mkdir()
    (tmp_path / "Mine/rows.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({**row, "relevant": [1], "gains": []})
    )
    task = EvalTask(name="Mine", meta_task="retrieval", metric="ndcg@5", reader="records", scope="global")
    queries = read_task(task, tmp_path, Quirks())
    assert queries[0].candidates is queries[1].candidates
    assert (queries[0].relevant, queries[0].gains, queries[1].relevant) == ((2, 0), (2.0, 1.0), (1,))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"query": "q"}', "line 1: field candidates: expected a non-empty list"),
        (
            '{"query": "q", "candidates": ["a"], "relevant": [3]}',
            "field relevant: expected a list of different positions, 0 to 0",
        ),
        ('{"query": "q", "candidates": [{}]}', r"field candidates\[0\]: empty; expected a text, an image or a video"),
        ('{"query": "q", "candidats": []}', r"unknown field 'candidats'; did you mean candidates\?"),
        ('{"candidates": ["a"]}', "field query is missing"),
    ],
)
def test_a_record_that_is_none_is_named_by_line_and_field(tmp_path: Path, row: str, problem: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(UserError, match=problem):
        read_eval_records(tmp_path / "rows.jsonl")
