"""`vlm2vec data show` prints the prompts of the recorded reference rows as each family's processor receives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.golden_mmeb import read_golden, write_golden
from PIL import Image
from tiny.fixtures import tiny_vlm  # noqa: F401
from tiny.models import FAMILIES
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.evaluation.prompt_format import PromptFormat, format_of
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.registry import BUILT_IN, families_with_tokens
from vlm2vec.types import EmbeddingInput

RUN = CliRunner()


def shown(*arguments: str) -> Any:
    result = RUN.invoke(app, ["data", "show", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["OK-VQA", "MSR-VTT", "ViDoRe_docvqa", "MomentSeeker", "CIRR"])
def test_prompts_media_candidates_and_gold_equal_the_recorded_reference(name: str, tmp_path: Path) -> None:
    golden = read_golden(name)
    write_golden(golden, tmp_path)
    task = shown("mmeb-v2", name, "--data", str(tmp_path), "--rows", "0:")
    assert task["scope"] == golden["expected"][0]["scope"]
    for query, entry in zip(task["queries"], golden["expected"], strict=True):
        assert query["query"]["prompt"] == entry["query_text"]
        frames = [m for media in query["query"]["media"] for m in media["frames"] or [media]]
        assert [frame["place"] for frame in frames] == [str(tmp_path / place) for place in entry["query_media"]]
        listed = golden["corpus"] if entry["scope"] == "global" else entry["candidates"]
        assert query["num_candidates"] == len(query["candidates"]) == len(listed)
        ours = {query["candidates"][position][1]["prompt"] for position in query["gold"]}
        assert ours == {listed[position]["text"] for position in entry["gold"]}
        for media, place in zip(frames, entry["query_media"], strict=True):
            width, height = golden["files"]["pictures"][place][:2]
            square = max(width, height) if len(entry["query_media"]) > 1 else 56
            assert media["size"] == ([width, height] if min(width, height) >= 28 else [square, square])


def test_a_family_without_videos_reads_the_frames_as_numbered_images(tmp_path: Path) -> None:
    golden = read_golden("MSR-VTT")
    write_golden(golden, tmp_path)
    task = shown("mmeb-v2", "MSR-VTT", "--data", str(tmp_path), "--family", "phi3_v", "--rows", "0")
    prompt = task["queries"][0]["candidates"][0][1]["prompt"]
    assert prompt == "".join(f"<|image_{k}|>" for k in range(1, 9)) + " Understand the content of the provided video."


def test_the_page_holds_the_images_and_marks_what_is_relevant(tmp_path: Path) -> None:
    golden = read_golden("ViDoRe_docvqa")
    write_golden(golden, tmp_path)
    page = tmp_path / "show.html"
    arguments = [
        "data",
        "show",
        "mmeb-v2",
        "ViDoRe_docvqa",
        "--data",
        str(tmp_path),
        "--rows",
        "0",
        "--html",
        str(page),
    ]
    assert RUN.invoke(app, arguments).exit_code == 0
    text = page.read_text()
    assert text.count("data:image/webp;base64,") == min(5, len(golden["corpus"])) and 'class="gold"' in text


def test_a_missing_image_is_named_and_the_prompt_is_shown(tmp_path: Path) -> None:
    golden = read_golden("OK-VQA")
    write_golden(golden, tmp_path)
    for place in golden["files"]["pictures"]:
        (tmp_path / place).unlink()
    media = shown("mmeb-v2", "OK-VQA", "--data", str(tmp_path), "--rows", "0")["queries"][0]["query"]["media"][0]
    assert media["size"] is None and "missing" in media["problem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OK-VQA", "--rows", "9:"), "selects no query"),
        (("OK-VQA", "--rows", "a"), "expected a range such as 0:3"),
        (("OK-VQA", "--family", "qwen2vl"), "did you mean qwen2_vl?"),
        (("OK-VQ",), "did you mean OK-VQA?"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_golden(read_golden("OK-VQA"), tmp_path)
    result = RUN.invoke(app, ["data", "show", "mmeb-v2", *arguments, "--data", str(tmp_path)])
    assert result.exit_code == 2 or isinstance(result.exception, ValueError)
    assert message in f"{result.output}{result.exception}"


@pytest.mark.parametrize("family", sorted(set(families_with_tokens()) & set(FAMILIES)))
def test_prompts_are_those_that_the_processor_of_the_family_gets(family: str, tiny_vlm: Any) -> None:  # noqa: F811
    folder = tiny_vlm(family)
    backbone = Embedder.from_pretrained(str(folder), dtype=torch.float32).backbone
    images = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green")]
    for item in (
        EmbeddingInput.of({"text": "a car", "images": images, "instruction": "find"}),
        EmbeddingInput.of({"text": "<|image_2|> then <|image_1|>", "images": images}),
        EmbeddingInput("a car"),
    ):
        prompt, media = format_of(str(folder)).write(item)
        if family == "phi3_v":
            assert prompt == backbone.template.render(item)
        else:
            written, order = backbone.prompt(item)
            assert (prompt, media) == (written, [item.images[position] for position in order])


def test_every_built_in_has_a_format() -> None:
    assert {format_of(name).family for name in BUILT_IN} == set(BUILT_IN)


def test_a_known_checkpoint_is_shown_with_its_own_template() -> None:
    prompt, _ = format_of("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct").write(EmbeddingInput("a car"))
    assert prompt.startswith("<|im_start|>system") and PromptFormat().write(EmbeddingInput("a car"))[0] == "a car"


def test_a_known_checkpoint_is_shown_with_the_switches_of_its_authors(tmp_path: Path) -> None:
    write_golden(read_golden("MSR-VTT"), tmp_path)
    model = ("--model", "Qwen/Qwen3-VL-Embedding-8B")
    query = shown("mmeb-v2", "MSR-VTT", "--data", str(tmp_path), "--rows", "0", *model)["queries"][0]
    turns = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ask = "Find a video that contains the following visual content:"
    assert query["query"]["prompt"] == turns.format(ask, "a man plays the guitar")
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    assert query["candidates"][0][1]["prompt"] == turns.format("Represent the user's input.", video)


@pytest.mark.parametrize("name", ["OK-VQA", "MSR-VTT", "ViDoRe_docvqa"])
def test_the_guide_shows_the_real_output(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_golden(read_golden(name), Path("mmeb"))
    output = RUN.invoke(app, ["data", "show", "mmeb-v2", name, "--data", "mmeb", "--rows", "0"]).stdout
    assert output.strip() in (Path(__file__).parents[2] / "docs/guides/mmeb.md").read_text(encoding="utf-8")
