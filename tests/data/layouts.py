"""Small sets in the published layouts, with their real columns and peculiarities."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec.data.mmeb.videos import SETS

TOKEN = "<|image_1|>"
NUM_QUERIES = 12


def draw_image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (number * 37 % 256, number * 91 % 256, number * 53 % 256)).save(path)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def instruct_row(kind: str, number: int, name: str = "Set") -> dict[str, Any]:
    """A row of the layout with instructions apart; texts and spaces as the published sets have them."""
    texts = [f"{name} label {i % 12}, comma list" for i in range(number, number + 12)]
    row = {"qry_inst": f"{TOKEN}\nIdentify the object shown in the image\n", "qry_text": "", "tgt_inst": ""}
    row |= {"qry_img_path": f"MMEB/{name}/q_{number}.png", "tgt_text": texts, "tgt_img_path": [""] * 12}
    if kind == "image_qa":
        row["qry_inst"] = f"{TOKEN}\nRepresent the given image with the following question:"
        row["qry_text"] = f"what is {number}? "  # VizWiz queries and ChartQA answers end in a space
        row["tgt_text"] = [f"{text} " for text in texts]
    if kind in ("image_t2i", "image_i2i_vg"):
        row["tgt_inst"] = f"{TOKEN}\nRepresent the given image."
        row["tgt_text"] = [" "] * 12
        row["tgt_img_path"] = [f"MMEB/{name}/c_{i % 12}.png" for i in range(number, number + 12)]
    if kind == "image_t2i":
        row |= {"qry_inst": "Find a picture of", "qry_text": f"{name} thing {number}", "qry_img_path": ""}
    return row


def write_image_set(root: Path, name: str, kind: str, with_instructions: bool) -> None:
    for i in range(12):
        for side in "qc":
            draw_image(root / f"MMEB/{name}/{side}_{i}.png", i + 20 * (side == "q") + sum(name.encode()))
    rows = [instruct_row(kind, number, name) for number in range(NUM_QUERIES)]
    if not with_instructions:
        for row in rows:
            row["qry_text"] = f"{row.pop('qry_inst')} {row['qry_text']}"
            instruction = row.pop("tgt_inst")
            row["tgt_text"] = [f"{instruction}{text}" if instruction else text for text in row["tgt_text"]]
    write_rows(root / name / "test-00000-of-00001.parquet", rows)


def write_visdoc_set(root: Path, name: str, images_inside: bool = True) -> None:
    corpus: list[dict[str, Any]] = []
    for i in range(15):
        encoded = io.BytesIO()
        Image.new("RGB", (10, 14), (i * 16, 255 - i * 16, i)).save(encoded, format="PNG")
        if images_inside:
            corpus.append({"corpus-id": i, "image": {"bytes": encoded.getvalue(), "path": f"{i}.png"}})
        else:
            corpus.append({"corpus-id": i})
            draw_image(root / f"visdoc-tasks/{name}/{i}.png", i)
    write_rows(root / name / "corpus/test-00000-of-00001.parquet", corpus)
    queries = [{"query-id": i, "query": f"where is {i}?", "language": ("english", "french")[i % 2]} for i in range(12)]
    write_rows(root / name / "queries/test-00000-of-00001.parquet", queries)
    judged = [{"query-id": i, "corpus-id": i, "score": 1} for i in range(12)]
    judged += [{"query-id": i, "corpus-id": i + 1, "score": 2} for i in range(0, 12, 3)]
    judged += [{"query-id": 0, "corpus-id": 9, "score": 0}]
    write_rows(root / name / "qrels/test-00000-of-00001.parquet", judged)


def video_row(name: str, number: int) -> tuple[dict[str, Any], list[str]]:
    """A row of a video set and the frame folders that it needs."""
    video, answers = f"vid_{number}", [f"answer {i}" for i in range(5)]
    letters = [f"{'ABCD'[i]}. answer {i}." for i in range(4)]
    clips = [f"clips/{number}_{i}.mp4" for i in range(3)]
    rows: dict[str, tuple[dict[str, Any], list[str]]] = {
        "MVBench": (
            {"subset": "action_count", "question": "how many", "video": f"{video}.mp4", "candidates": answers[:3]}
            | {"answer": answers[number % 3]},
            [f"action_count/{video}.mp4"],
        ),
        "Video-MME": (
            {"question": "which?", "videoID": video, "options": letters, "answer": "ABCD"[number % 4]},
            [video],
        ),
        "NExTQA": (
            {"video": number, "question": "why", "answer": number % 5} | {f"a{i}": answers[i] for i in range(5)},
            [str(number)],
        ),
        "EgoSchema": (
            {"video_idx": video, "question": "what? ", "answer": str(number % 4), "option": letters},
            [video],
        ),
        "ActivityNetQA": (
            {"video_name": video, "question": "is it", "answer": ("yes", "no")[number % 2]},
            [f"v_{video}"],
        ),
        "SmthSmthV2": ({"video_id": number, "pos_text": answers[number % 5], "neg_text": answers}, [str(number)]),
        "DiDeMo": ({"video": f"videos/{video}.mp4", "caption": f"scene {number}"}, [video]),
        "MSR-VTT": ({"video_id": video, "video": f"{video}.mp4", "caption": f"scene {number}"}, [video]),
        "MSVD": ({"video_id": video, "video": video, "caption": [f"scene {number}", "another"]}, [video]),
        "VATEX": ({"videoID": video, "enCap": [f"scene {number}", "another"]}, [video]),
        "YouCook2": ({"id": video, "video_path": "x", "sentence": f"cut {number}"}, [video]),
        "MomentSeeker": (
            {"query": f"moment {number}", "input_frames": ("", f"in/{number}.mp4", f"{number}.jpg")[number % 3]}
            | {"positive_frames": [{"output_path": clips[0]}]}
            | {"negative_frames": [{"output_path": clip} for clip in clips[1:]]},
            [f"video_frames/clips_{number}_{i}" for i in range(3)] + [f"video_frames/in_{number}"],
        ),
    }
    if name in ("QVHighlight", "Charades-STA"):
        folders = [f"{video}/{clip}" for clip in ("query", "positive_0", "negative_1", "negative_2")]
        return {"query": f"scene {number}", "video_path": f"x/{video}.mp4"}, folders
    return rows.get(name, ({"video_id": video, "pos_text": answers[number % 5]}, [video]))


def write_video_set(root: Path, name: str, num_frames: int = 3) -> None:
    rows = []
    for number in range(NUM_QUERIES):
        row, folders = video_row(name, number)
        rows.append(row)
        for place, folder in enumerate(folders):
            for frame in range(num_frames):
                file = root / SETS[name].frames / folder / f"frame_{frame}.jpeg"
                draw_image(file, number * 7 + place * 3 + frame)
        if name == "MomentSeeker":
            draw_image(root / SETS[name].frames / f"query_{number}.jpg", number)
    write_rows(root / name / "data/test-00000-of-00001.parquet", rows)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as parquet or JSON lines, by the file's ending."""
    if path.suffix == ".parquet":
        write_rows(path, rows)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def corpus_rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """Fifteen documents, twelve queries and their judgements, with the columns of the set's family."""
    family = name.split("/")[0]
    n = range(NUM_QUERIES)
    if family == "BRIGHT":
        documents = [{"id": f"d/{i}.txt", "content": f"{name} post {i}"} for i in range(15)]
        return {
            "queries": [{"id": str(i), "query": f"why {i}?", "gold_ids": [f"d/{i}.txt", f"d/{i + 1}.txt"]} for i in n],
            "corpus": documents,
        }
    if family == "ToolDe":
        tools = [{"id": f"tool_{i}", "documentation": json.dumps({"name": f"{name} {i}"}, indent=1)} for i in range(15)]
        labels = [json.dumps([{"id": f"tool_{i}", "doc": {}, "relevance": 1}]) for i in n]
        asks = ("Given a request, find the tool", "")
        return {
            "queries": [{"id": f"q{i}", "query": f"do {i}", "instruction": asks[i % 2], "label": labels[i]} for i in n],
            "corpus": tools,
        }
    if family == "MCMR":
        images = [
            [{"url": f"https://x.org/i/gone_{i}.jpg"}, {"url": f"https://x.org/i/p_{i}.png?v=1"}] for i in range(15)
        ]
        products = [
            {"candidate_id": i, "title": f"lamp {i}", "description": ["red", ""], "features": [], "price": 9.5}
            | {"Date First Available": None, "images": images[i]}
            for i in range(15)
        ]
        return {"queries": [{"qid": i, "query": f"lamp {i}", "pos_ids": [i]} for i in n], "corpus": products}
    documents = [{"_id": f"d{i}", "title": ("", "Title")[i % 2], "text": f"{name} text {i}"} for i in range(15)]
    queries = [
        {"_id": f"q{i}", "text": f"find {i}"} | {f"instruction_{kind}": f"{kind} {i}" for kind in ("og", "changed")}
        for i in n
    ]
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 2} for i in n]
    judged += [{"query-id": f"q{i}", "corpus-id": f"d{i + 1}", "score": i % 2} for i in n]
    return {"queries": queries, "corpus": documents, "qrels": judged}


def write_corpus_set(root: Path, name: str, files: Mapping[Any, str]) -> None:
    rows = corpus_rows(name)
    for part, place in files.items():
        write_table(root / place, rows[part])
    if name == "MCMR":
        for i in range(15):
            draw_image(root / f"multi-condition-tasks/MCMR/images/p_{i}.png", i)
