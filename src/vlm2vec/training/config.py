"""Training recipes: reads YAML and dotted overrides into typed settings and checks them for contradictions.

The attribute docstrings are the reference of the recipe keys.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from vlm2vec.errors import UserError, did_you_mean, expected_in, field_of, shown
from vlm2vec.media.text import read_text
from vlm2vec.training.loss_settings import LossSettings, Section
from vlm2vec.training.rerank_settings import RerankSettings

logger = logging.getLogger(__name__)


class ModelSettings(Section):
    """The model and its trained components."""

    base: str = "compact"
    """The model to train: a built-in model, a checkpoint folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. null: the main branch."""
    family: str | None = None
    """`model_type` of the base's HF config; only a dry run needs it, to build a tiny model of the same family."""
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies defaults)
    """Options of the family, such as `num_layers` of compact or `max_pixels` of Qwen2-VL."""
    pooling: Literal["last", "mean"] | None = None
    """The embedding is the state of the last token (as in VLM2Vec), or the mean over all tokens. null:
    as in the base."""
    attention: Literal["causal", "bidirectional"] | None = None
    """Attention mask. "causal": the family's own mask; "bidirectional": every token attends to all tokens. null: as in
    the base."""
    gradient_checkpointing: bool = False
    """Activation checkpointing: recompute the activations of a chunk in its backward pass. Uses less memory and about a
    third more time."""
    quantize: Literal["int8", "nf4"] | None = None
    """Stores the frozen weights of the language model in 8 or 4 bits under LoRA; null: in the compute precision. The
    saved adapter belongs to the base in full precision."""
    attention_kernel: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Implementation of attention. "auto" and "sdpa": torch's fused kernels; "eager": plain matrix products, for
    comparisons; "flash_attention_2": the package flash-attn, on a GPU only. All compute the same attention."""
    components: Literal["language", "vision", "both"] | None = None
    """Components to train. "vision" is everything before the language model: vision encoder and projector. null: with
    LoRA the language model, without LoRA both."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "towers" in values:
            logger.warning("model.towers is deprecated; use model.components")
            values = {name: value for name, value in values.items() if name != "towers"} | {
                "components": values.get("components", values["towers"])
            }
        return values


class LoraSettings(Section):
    """Low-rank adapters; `lora: null` trains every parameter that is not frozen."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update matrices. In VLM2Vec's ablation, ranks 4 to 8 are best (arXiv 2410.05160, table 3)."""
    alpha: int = Field(default=64, ge=1)
    """Scale of the update, which is multiplied by alpha / rank. The default is that of the released VLM2Vec code."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout probability at the input of the adapters. The default is that of the released VLM2Vec code."""
    targets: list[str] | None = None
    """Names of the linear layers to adapt; null: all linear layers of `model.components`."""
    dora: bool = False
    """Weight-decomposed adapters: a trained norm in addition to the low-rank update. Slower, and slightly closer to
    full fine-tuning. The published VLM2Vec code always uses it."""


class SetSettings(Section):
    """One training set."""

    weight: float | None = Field(default=None, gt=0)
    """Sampling weight, on any scale; null: by size (`data.size_exponent`)."""
    max_pairs: PositiveInt | None = None
    """Maximum number of pairs, sampled at random; null: `data.max_pairs`."""
    target_instruction: str | None = None
    """Instruction for targets and negatives that have none; encode candidates with the same instruction. Verbatim
    prompts (with `<|image_1|>`, as published by MMEB) are not changed. null: no instruction."""
    reference_negative: bool = False
    """Add the query's image, with the text of the target, as a hard negative. For composed image retrieval (CIRR,
    FashionIQ), where the query's reference image is one of the candidates. Pairs without images on both sides are not
    changed."""


class DataSettings(Section):
    """The training sets and the sampling of batches."""

    root: Path
    """Folder of the sets, relative to the working directory: sets in the MMEB-train layout, and sets of records
    (`.jsonl`, `.parquet`, webdataset `.tar`, or folders of these), which are streamed."""
    sets: dict[str, float | SetSettings] | list[str] | None = None
    """A list of names, or a mapping from names to weights or to settings of the set; null: all sets of the folder."""
    max_pairs: PositiveInt | None = None
    """Maximum number of pairs per set, sampled at random; null: all pairs. The VLM2Vec paper used 50,000."""
    size_exponent: float = Field(default=1.0, ge=0, le=1)
    """The weight of a set without `weight` is its size to this power. 1: proportional to size; 0: equal weights."""
    batching: Literal["mixed", "single", "interleaved"] = "interleaved"
    """Sampling. "mixed": each pair from any set; "single": each batch from one set; "interleaved": each sub-batch from
    one set. VLM2Vec-V2 found sub-batches of 64 in a batch of 1,024 best on images (arXiv 2507.04590, table 4)."""
    sub_batch_size: int = Field(default=64, ge=1)
    """Pairs per sub-batch over all ranks (interleaved only); divides `train.batch_size`, or is at least as large."""
    instructions: Literal["original", "diverse"] = "original"
    """Files to read in the MMEB-train layout: `original-*` (one wording per set) or `diverse_instruction-*`."""
    use_negatives: bool = True
    """Use the hard negatives of the data, if there are any."""
    mask_equal_targets: bool = True
    """Exclude targets that equal a query's positive from its negatives."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Every image is checked before the first step. "stop": an unreadable image is an error; "skip": its pairs are left
    out and counted."""
    check_images: Literal["header", "decode"] = "header"
    """"header": check the header and the end mark of each file; "decode": decode each image completely. Later runs
    check only images whose path, size or time is new."""
    num_workers: int = Field(default=0, ge=0)
    """Number of processes that prepare batches. 0: the main process, which is sufficient if images are cached."""
    prefetch_gib: float = Field(default=8.0, gt=0)
    """Maximum memory of all prepared batches on a machine in GiB; limits the number of data loader processes."""


class TrainSettings(Section):
    """Optimization, memory and output of a run."""

    steps: int = Field(ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=128, ge=2)
    """Pairs per step over all ranks. The targets of all other pairs are negatives; VLM2Vec trains with 1,024."""
    chunk_size: int | None = Field(default=32, ge=1)
    """Maximum number of inputs per forward pass on each rank (GradCache). It affects memory, not the gradient. null:
    limited by `chunk_tokens` only."""
    chunk_tokens: PositiveInt | Literal["auto"] | None = None
    """Maximum number of tokens per forward pass on each rank, including visual tokens and padding; null: no limit.
    auto: on a GPU the number that fits its memory by the plan, halved once on out of memory; on the CPU 2,048."""
    kept_chunks: NonNegativeInt | Literal["auto"] = "auto"
    """Number of chunks that keep their graph and skip the second forward pass: faster, more memory, same gradient.
    auto: on a GPU as many as fit its memory; elsewhere one, which does not raise the peak."""
    reuse_vision: Literal["no", "step", "disk"] = "step"
    """Forward passes of a frozen vision encoder. "no": two per step; "step": one per step; "disk": one per image, with
    the features in the cache folder (about 3 KB per visual token)."""
    merge_equal: bool = True
    """Encode equal queries, and equal targets, of a batch only once. With dropout they then share a dropout mask."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate (AdamW). The default is that of the released VLM2Vec script, for LoRA on large models."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up: decay to 0 (linear or cosine), or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to this norm."""
    temperature: float = Field(default=0.02, gt=0)
    """Divisor of the cosine in the loss; 0.02 as in VLM2Vec. Small models need a higher value, such as 0.1."""
    bf16: bool | None = None
    """Train under autocast to bfloat16; null: if the hardware supports bfloat16 natively."""
    seed: int = 42
    """Seed of new weights, dropout and the order of the data."""
    log_steps: int = Field(default=10, ge=1)
    """Steps between log entries."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between step checkpoints, from which --resume continues."""
    report_to: list[str] | None = None
    """Trackers of transformers, such as tensorboard; null: trackio if it is installed, otherwise none. The run's own
    report.html is always written."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the trained weights, which is saved instead of the last weights; null: off."""
    sharding: Literal["none", "full"] = "none"
    """With several ranks. "none": each rank holds the whole model (DDP); "full": parameters, gradients and optimizer
    state are sharded over the ranks (FSDP2)."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.sharding == "full" and self.ema_decay is not None:
            raise ValueError("sharding full does not support a moving average; set ema_decay to null")
        return self


class EvaluateSettings(Section):
    """Evaluation during training, on all ranks."""

    benchmark: str
    """Name of a shipped benchmark, or a YAML file."""
    data: Path | None = None
    """Folder of the evaluation sets; null: the folder named in the benchmark file."""
    tasks: list[str] | None = None
    """Names of the tasks; null: all tasks."""
    num_queries: int | None = Field(default=None, ge=1)
    """Number of queries per task, counted from the first; null: all."""
    every_steps: int = Field(default=100, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    at_start: bool = False
    """Also evaluate before the first step, for comparison with the untrained model."""
    best_by: str = "overall"
    """Group of tasks; the checkpoint with its highest mean is kept in `best/`."""


class GuardSettings(Section):
    """Conditions that stop training."""

    collapse_cosine: float = Field(default=0.9999, gt=0, le=1)
    """Mean cosine of different inputs above which the embeddings count as collapsed."""
    collapse_steps: PositiveInt = 50
    """Number of consecutive collapsed steps that stops the run."""
    memory_climb_mib: PositiveInt | None = None
    """Memory growth in MiB, after `memory_settle_steps`, that stops the run; --resume continues from the last step
    checkpoint. null: only record memory."""
    memory_settle_steps: PositiveInt = 20
    """Number of steps after which the reference value of memory is taken."""


class Recipe(Section):
    """All settings of a run."""

    task: Literal["embed", "rerank"] = "embed"
    """"embed": an embedding model; "rerank": a model that reads query and candidate together, see `rerank`."""
    model: ModelSettings = ModelSettings()
    lora: LoraSettings | None = LoraSettings()
    data: DataSettings
    train: TrainSettings
    loss: LossSettings = LossSettings()
    rerank: RerankSettings = RerankSettings()
    evaluate: EvaluateSettings | None = None
    guard: GuardSettings = GuardSettings()
    output: Path

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.base == "compact-dual" and self.model.pooling == "mean":
            raise ValueError("model.pooling has no effect on compact-dual; remove it")
        if self.train.sharding == "full" and self.evaluate is not None:
            raise ValueError(
                "train.sharding full does not support evaluation during training; use vlm2vec eval on its checkpoints"
            )
        if self.model.quantize and (self.lora is None or self.train.sharding == "full"):
            raise ValueError("model.quantize needs lora and train.sharding none: it keeps frozen weights in fewer bits")
        batch, part = self.train.batch_size, self.data.sub_batch_size
        if self.data.batching == "interleaved" and part < batch and batch % part:
            raise ValueError(f"data.sub_batch_size {part} must divide train.batch_size {batch}")
        return self

    @model_validator(mode="after")
    def _suits_task(self) -> Recipe:
        if self.task == "embed":
            if self.rerank != RerankSettings():
                raise ValueError("rerank has no effect on task embed; set task: rerank, or remove the section")
            return self
        without_effect = {
            "loss": self.loss != LossSettings(),
            "evaluate": self.evaluate is not None,
            "model.pooling": self.model.pooling == "mean",
            "train.ema_decay": self.train.ema_decay is not None,
            "train.sharding": self.train.sharding != "none",
            "model.quantize": self.model.quantize is not None,
        }
        if given := [name for name, is_given in without_effect.items() if is_given]:
            raise ValueError(f"task rerank does not support {', '.join(given)}; remove the setting")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as `train.steps=100`.

    If there is no `lora` section and the base has an adapter, the settings of that adapter are used.

    Raises:
        UserError: for a missing file, invalid YAML, an unknown key, an invalid value or a contradiction.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise UserError(f"override {shown(override)}: expected key=value, such as train.steps=100")
    text = read_text(path)
    try:
        loaded = OmegaConf.load(io.StringIO(text))
        if not OmegaConf.is_dict(loaded):
            raise ValueError("expected a mapping with data, train and output")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return _with_adapter(Recipe.model_validate(OmegaConf.to_container(merged, resolve=True)))
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a valid recipe ({' '.join(str(error).split())[:200]})") from error


def _with_adapter(recipe: Recipe) -> Recipe:
    """Adds the LoRA settings of the base's adapter, unless the recipe has its own."""
    if "lora" in recipe.model_fields_set or recipe.model.base == "compact":
        return recipe
    from vlm2vec.training.base_adapter import adapter_settings  # imports torch, which no other recipe needs here

    found = adapter_settings(recipe.model.base)
    return recipe.model_copy(update={"lora": LoraSettings(**found)}) if found else recipe


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, which `load_recipe` can read."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = field_of(first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key {field}{did_you_mean(field, _keys(Recipe)) or '; remove it or check its spelling'}"
    reason = expected_in(first["msg"])
    return f"{field}: {reason} (found {shown(first['input'])})" if first["loc"] else reason


def _keys(section: type[BaseModel]) -> list[str]:
    """Returns all keys of a recipe, dotted."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [key for kind in kinds if issubclass(kind, Section) for key in _keys(kind)]
        keys += [name, *(f"{name}.{key}" for key in inner)]
    return keys
