"""The planner's closed forms compared with counts on real networks, and its output for the shipped recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from planning.full_size import FULL_SIZE
from samples import write_train_set
from tiny.models import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.cli import app
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.checkpoints.known import find
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.planning.cost import (
    GIB,
    Inputs,
    Training,
    adapter_parameters,
    decoder_flops,
    layer_bytes,
    parameters,
    step_flops,
    training_memory,
    vision_flops,
)
from vlm2vec.planning.geometry import SAME_SIZES, Geometry, geometry, geometry_of, known_configs
from vlm2vec.planning.plan import GPUS, chunk_tokens_for, gpu_of, plan_training
from vlm2vec.planning.sizing import memory_table, sizing_table
from vlm2vec.training.chunks import training_of
from vlm2vec.training.config import Recipe, TrainSettings, load_recipe
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.precision import train_in_float32
from vlm2vec.training.recipes import find_recipe
from vlm2vec.training.sample import sample_inputs
from vlm2vec.training.step import ContrastiveStep

TINY = ["llava_next", "qwen2_vl", "qwen3_vl"]


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Geometry]:
    """A tiny network of a family and its sizes by the planner."""
    if request.param not in FAMILIES:
        pytest.skip(f"no tiny {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].build(folder)
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    size = getattr(embedder.backbone.processor.image_processor, "size", None) or {}
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    limits = limits if "qwen" in request.param else {}
    options = {name: value for name, value in limits.items() if value}
    return embedder, geometry(request.param, config, options)


def counted(embedder: Embedder, item: EmbeddingInput) -> tuple[int, int]:
    """FLOPs of a forward pass, and tokens."""
    batch = embedder.backbone.process([item])
    # torch does not count its fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        embedder(batch)
    return counter.get_total_flops(), int(batch["attention_mask"].sum())


def test_parameters_are_those_of_the_network_but_for_norms_and_biases(pair: tuple[Embedder, Geometry]) -> None:
    embedder, model = pair
    matrices = sum(p.numel() for p in embedder.parameters() if p.dim() > 1)
    assert sum(parameters(model).values()) == pytest.approx(matrices, rel=0.05)
    language = {id(p) for p in embedder.backbone.language_model.parameters() if p.dim() > 1}
    in_language = sum(p.numel() for p in embedder.parameters() if id(p) in language)
    assert parameters(model)["language model"] + parameters(model)["token embeddings"] == in_language


def test_adapters_have_the_computed_number_of_parameters(tmp_path: Path) -> None:
    FAMILIES["qwen2_vl"].build(tmp_path)
    embedder = Embedder.from_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    add_adapter(embedder.backbone, 4, 8, 0.0, None)
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    model = geometry("tiny", json.loads((tmp_path / "config.json").read_text()), {})
    assert adapter_parameters(model, 4) == trained


def test_flops_of_text_are_those_that_torch_counts(pair: tuple[Embedder, Geometry]) -> None:
    embedder, model = pair
    flops, tokens = counted(embedder, EmbeddingInput("word " * 40))
    assert decoder_flops(model, tokens) == pytest.approx(flops, rel=0.005)


def test_flops_and_tokens_of_an_image_are_those_that_are_counted(pair: tuple[Embedder, Geometry]) -> None:
    embedder, model = pair
    image = ImageRef.of(Image.new("RGB", (70, 50)))
    flops, tokens = counted(embedder, EmbeddingInput("x", (image,)))
    _, without = counted(embedder, EmbeddingInput("x"))
    cost = model.image(70, 50)
    assert tokens - without - cost.tokens in range(5)  # what a template writes around an image
    vision = flops - decoder_flops(model, tokens)
    assert vision_flops(model, cost) == pytest.approx(vision, rel=0.05)


def test_activations_of_a_layer_are_those_that_autograd_keeps(tmp_path: Path) -> None:
    kept = []
    FAMILIES["qwen2_vl"].build(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers in (2, 4):
        config["text_config"] |= {"num_hidden_layers": layers, "layer_types": None}
        folder = tmp_path / str(layers)
        embedder = grown(tmp_path, folder, config)
        batch = embedder.backbone.process([EmbeddingInput("a" * 64)] * 2)
        own = {p.untyped_storage().data_ptr() for p in embedder.parameters()}
        sizes: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor, own: Any = own, sizes: Any = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            embedder(batch)
        kept.append(sum(size for size, _ in sizes.values()) / batch["input_ids"].numel())
    model = geometry("tiny", config, {})
    assert layer_bytes(model, dropout=True, mask_bytes=4) == pytest.approx((kept[1] - kept[0]) / 2, rel=0.15)


def test_flops_of_a_whole_training_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    FAMILIES["qwen2_vl"].build(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Wide enough that the heads of one rank do not dominate.
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": None, "intermediate_size": 512}
    embedder = grown(tmp_path, tmp_path / "wide", config)
    image = ImageRef.of(Image.new("RGB", (70, 50)))
    examples = [TrainExample(EmbeddingInput("a" * 40 + str(i), (image,)), EmbeddingInput("b" * 9)) for i in range(4)]
    batch = collate_pairs(embedder.backbone.process, examples, merge_equal=False)
    settings = TrainSettings(steps=1, chunk_size=2, kept_chunks=0)
    objective, device = Objective(LossSettings(), 0.1), torch.device("cpu")
    with patch("vlm2vec.training.step.attention_for", lambda *args: sdpa_kernel(SDPBackend.MATH)):
        step = ContrastiveStep(embedder, objective, settings, device, FrozenVision(embedder.backbone.model))
        with FlopCounterMode(display=False) as counter:
            step.backward(batch)
    size = getattr(embedder.backbone.processor.image_processor, "size", {})
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    model = geometry("tiny", config, {name: value for name, value in limits.items() if value})
    lengths = batch.inputs.lengths()
    texts = (lengths[0] - model.image(70, 50).tokens, lengths[-1])
    planned = step_flops(model, replace(TRAINING, pairs=4, rank=4), Inputs(texts, (1, 0), (70, 50))).total
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)


def grown(source: Path, folder: Path, config: dict[str, object]) -> Embedder:
    """The tiny model with other sizes, random weights, adapters on and its base in bfloat16."""
    import shutil

    import transformers

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "[0-9]"))
    (folder / "config.json").write_text(json.dumps(config))
    made = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForImageTextToText.from_config(made, dtype=torch.float32).save_pretrained(folder)
    embedder = Embedder.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    add_adapter(embedder.backbone, 4, 8, 0.1, None)
    train_in_float32(embedder)
    return embedder.train()


def test_sizes_of_the_shipped_models_are_those_that_are_published() -> None:
    published = {"Qwen2-VL-2B": 2.21, "Qwen2-VL-7B": 7.62, "Qwen3-VL-8B": 8.14, "mistral-7b": 7.57, "Phi-3.5": 4.15}
    for name in known_configs():
        wanted = next((size for part, size in published.items() if part in name), None)
        if wanted:
            assert sum(parameters(geometry_of(name)).values()) / 1e9 == pytest.approx(wanted, rel=0.05)


def test_images_have_the_tokens_of_their_processors() -> None:
    tokens = {name: geometry_of(name).image(640, 480).tokens for name in known_configs()}
    assert tokens["Qwen/Qwen2-VL-2B-Instruct"] == 23 * 17
    assert tokens["Qwen/Qwen3-VL-2B-Instruct"] == 20 * 15
    assert tokens["microsoft/Phi-3.5-vision-instruct"] == 757
    assert geometry_of("Qwen/Qwen2-VL-2B-Instruct", {"max_pixels": 28 * 28 * 100}).image(4000, 3000).tokens <= 100


TRAINING = Training(1024, 100, 8192, rank=16, dropout=0.1)


def test_each_saving_saves_and_each_cost_costs() -> None:
    model = geometry_of("Qwen/Qwen2-VL-7B-Instruct")

    def peak(training: Training) -> float:
        return training_memory(model, training, Inputs()).total

    def flops(training: Training) -> int:
        return step_flops(model, training, Inputs()).total

    plain = TRAINING
    assert peak(replace(plain, dora=True)) > peak(plain) > peak(replace(plain, chunk_tokens=4096))
    assert peak(replace(plain, checkpointing=True)) < peak(plain) / 2
    assert flops(replace(plain, dora=True)) > flops(replace(plain, checkpointing=True)) > flops(plain)
    assert flops(replace(plain, reuses_vision=False)) > flops(plain)
    assert peak(replace(plain, rank=0)) > peak(plain)


def test_what_does_not_fit_comes_with_changes_that_make_it_fit_cheapest_first() -> None:
    model = geometry_of("Qwen/Qwen2-VL-7B-Instruct")
    plan = plan_training(model, replace(TRAINING, dora=True), Inputs(), GPUS["h100"])
    assert not plan.fits
    assert plan.changes[0].setting == "lora.dora=false"
    assert plan.changes[-1].memory_gib <= GPUS["h100"].memory_gib
    assert [c.memory_gib for c in plan.changes] == sorted((c.memory_gib for c in plan.changes), reverse=True)
    fitting = plan_training(model, replace(TRAINING, chunk_tokens=4096), Inputs(), GPUS["h100"])
    assert fitting.fits and fitting.changes == ()
    eight = plan_training(model, TRAINING, Inputs(), GPUS["h100"], 8)
    one = plan_training(model, TRAINING, Inputs(), GPUS["h100"], 1)
    assert eight.hours == pytest.approx(one.hours / 8)


def test_the_last_change_for_a_small_gpu_is_a_base_in_fewer_bits() -> None:
    model = geometry_of("Qwen/Qwen3-VL-8B-Instruct")
    plan = plan_training(model, TRAINING, Inputs(), gpu_of("11,100"))
    assert [change.setting for change in plan.changes[-2:]] == ["model.quantize=int8", "model.quantize=nf4"]
    assert plan.changes[-1].memory_gib <= 11 < plan.changes[-2].memory_gib


def test_the_largest_mini_batch_that_fits_is_found() -> None:
    model = geometry_of("Qwen/Qwen2-VL-2B-Instruct")
    found = chunk_tokens_for(model, TRAINING, Inputs(), 24)
    assert found is not None
    assert training_memory(model, replace(TRAINING, chunk_tokens=found), Inputs()).total <= 24 * GIB
    assert training_memory(model, replace(TRAINING, chunk_tokens=2 * found), Inputs()).total > 24 * GIB
    assert chunk_tokens_for(model, TRAINING, Inputs(), 4) is None


def test_the_command_plans_training_encoding_and_an_evaluation_offline() -> None:
    for more in ([], ["--encode", "1000000"], ["--eval", "mmeb-v1", "--gpu", "23.5,165", "--count", "2"]):
        result = CliRunner().invoke(app, ["plan", "vlm2vec-v2-qwen2vl", *more])
        assert result.exit_code == 0, result.output
        assert "computed, not measured" in result.output and "GPU-hours" in result.output


def test_an_average_pair_is_that_of_the_data_folder(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (100 + 40 * (i % 2), 50)).save(tmp_path / f"{i}.png")
    row = {"qry": "<|image_1|>\n" + "a" * 27, "pos_text": "b" * 8, "neg_text": "c" * 16}
    write_train_set(tmp_path, "Seen", [{**row, "qry_image_path": f"{i}.png"} for i in range(4)])
    write_train_set(tmp_path, "Read", [{"qry": "d" * 80, "pos_text": "e" * 40}] * 100)
    values = {"train": {"steps": 10}, "output": tmp_path / "run", "model": {"base": "Qwen/Qwen2-VL-2B-Instruct"}}
    data = {"root": tmp_path, "sets": {"Seen": 3.0, "Read": 1.0}}
    inputs, line = sample_inputs(Recipe.model_validate({**values, "data": data}))
    assert inputs.images == (0.75, 0, 0) and inputs.texts == (0.75 * 10 + 0.25 * 20, 0.75 * 2 + 0.25 * 10, 0.75 * 4)
    assert inputs.size[0] * inputs.size[1] == pytest.approx(120 * 50, rel=0.03)
    assert str(tmp_path) in line and "assuming 4 characters per token" in line
    by_size = sample_inputs(Recipe.model_validate({**values, "data": {"root": tmp_path}}))[0]
    assert by_size.images[0] == pytest.approx(4 / 104)  # all rows count, not only those that are read
    nothing, line = sample_inputs(Recipe.model_validate({**values, "data": {"root": tmp_path / "no"}}))
    assert nothing == Inputs() and "no such folder; assumed" in line


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(UserError, match="--gpu tpu: unknown"):
        gpu_of("tpu")
    with pytest.raises(UserError, match="planning requires a folder"):
        geometry_of("someone/model")
    with pytest.raises(UserError, match="model_type 'mllama'"):
        geometry("m", {"model_type": "mllama"}, {})


@pytest.mark.parametrize("table", [sizing_table, memory_table])
def test_the_tables_of_the_docs_are_the_planners(table: Callable[[], str]) -> None:
    page = Path(__file__).parents[2] / "docs/guides/gpus.md"
    assert table() in page.read_text(), f"run {table.__name__}() again and put its text into the page"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_shipped_recipe_fits_the_gpus_that_its_head_names(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    model = geometry_of(recipe.model.base, recipe.model.options)
    tokens = chunk_tokens_for(model, training_of(recipe), Inputs(), GPUS["h100"].memory_gib, 8)
    assert recipe.train.chunk_tokens == "auto" and tokens is not None and tokens >= 4096
    assert plan_training(model, training_of(recipe, tokens), Inputs(), GPUS["h100"], 8).fits


@pytest.mark.parametrize("name", [name for name in FULL_SIZE if "embedding" in name])
def test_a_recipe_for_one_gpu_fits_one(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    model = geometry_of(recipe.model.base, recipe.model.options)
    tokens = chunk_tokens_for(model, training_of(recipe), Inputs(), GPUS["h100"].memory_gib, 1)
    assert tokens is not None and plan_training(model, training_of(recipe, tokens), Inputs(), GPUS["h100"], 1).fits


def test_models_with_the_sizes_of_another_are_those_that_were_trained_from_it() -> None:
    for model, base in SAME_SIZES.items():
        known = find(model)
        assert known is not None and known.bases[known.ids.index(model)] == base
