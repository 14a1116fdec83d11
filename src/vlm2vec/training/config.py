"""A training recipe: YAML plus dotted overrides -> typed settings. Contradictory settings are refused here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from vlm2vec.errors import UserError, did_you_mean, shown
from vlm2vec.losses import LOSSES, Hardness

logger = logging.getLogger(__name__)


class Section(BaseModel):
    """Settings whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    """The model and its trained components."""

    base: str = "compact"
    """A built-in model, a folder or a hub id."""
    revision: str | None = None
    family: str | None = None
    """`model_type` of the base's HF config; only a dry run needs it, to build a tiny model of the same family."""
    options: dict[str, Any] = {}
    """Settings of the family, such as `num_layers` of compact."""
    pooling: Literal["last", "mean"] = "last"
    """The state of the last token, or the mean over all tokens."""
    attention: Literal["causal", "bidirectional"] | None = None
    """The family's own mask between tokens, or attention of every token to all tokens. null: as in the base."""
    gradient_checkpointing: bool = False
    """Recomputes the activations of a chunk in its backward pass: less memory, about a third more time."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keeps the frozen weights of the language model in 8 or 4 bits under LoRA; null: in the precision in which they
    compute. The saved adapter belongs to the base in full precision."""
    attention_kernel: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How attention is computed. "auto" and "sdpa": torch's fused kernels; "eager": plain matrix products, for
    comparisons; "flash_attention_2": the package flash-attn, on a GPU only. All compute the same attention."""
    components: Literal["language", "vision", "both"] | None = None
    """Which components are trained. "vision" is everything before the language model: vision encoder and projector.
    null: with LoRA the language model, without it both."""

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
    """VLM2Vec's ablation favours 4 to 8 (arXiv 2410.05160, table 3)."""
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: list[str] | None = None
    """Linear layers by name; null: those of `model.components`."""
    dora: bool = False
    """Weight-decomposed adapters: a trained norm beside the low-rank update. Slower, and slightly closer to full
    fine-tuning. The published VLM2Vec code always uses it."""


class SetSettings(Section):
    """One training set."""

    weight: float | None = Field(default=None, gt=0)
    """Share in the batches, on any scale; null: by size."""
    max_pairs: PositiveInt | None = None
    """Maximum number of pairs, sampled at random; null: `data.max_pairs`."""
    target_instruction: str | None = None
    """Instruction of targets and negatives that have none of their own; encode candidates with the same one. Verbatim
    prompts (with `<|image_1|>`, as MMEB publishes) stay as they are. null: none."""


class DataSettings(Section):
    """The training sets and how batches are drawn from them."""

    root: Path
    """Folder of the sets, relative to the working directory: sets in the MMEB-train layout, and sets of records
    (`.jsonl`, `.parquet`, webdataset `.tar`, or folders of these), which are streamed."""
    sets: dict[str, float | SetSettings] | list[str] | None = None
    """Names, or names with weights or with settings of the set; null: every set of the folder."""
    max_pairs: PositiveInt | None = None
    """Maximum number of pairs of each set, sampled at random; the paper used 50,000."""
    size_exponent: float = Field(default=1.0, ge=0, le=1)
    """A set without a weight is weighted by its size to this power: 1 by size, 0 all equal."""
    batching: Literal["mixed", "single", "interleaved"] = "interleaved"
    """Each pair from any set; each batch from one set; or each sub-batch from one set. VLM2Vec-V2
    found sub-batches of 64 in 1,024 best on images (arXiv 2507.04590, table 4)."""
    sub_batch_size: int = Field(default=64, ge=1)
    """Pairs per sub-batch over all ranks (interleaved); divides `train.batch_size`, or is at least as large."""
    instructions: Literal["original", "diverse"] = "original"
    """Which files of sets in the MMEB-train layout: `original-*` (one wording per set) or `diverse_instruction-*`."""
    use_negatives: bool = True
    mask_equal_targets: bool = True
    """Targets equal to a query's positive are not its negatives."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Every image is checked before the first step. An unreadable one stops the run, or its pairs are left out and
    counted."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that prepare batches; 0: the main process, which suffices if images are cached."""
    prefetch_gib: float = Field(default=8.0, gt=0)
    """Memory of all prepared batches of a machine. If `num_workers` would hold more, fewer processes run."""


class TrainSettings(Section):
    """Optimization, memory and output of a run."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    """Pairs per step over all ranks. The targets of all other pairs are negatives."""
    chunk_size: int | None = Field(default=32, ge=1)
    """Maximum number of inputs per forward pass on each rank (GradCache). It changes memory, not the gradient. null:
    limited by `chunk_tokens` only."""
    chunk_tokens: PositiveInt | Literal["auto"] | None = None
    """Maximum number of tokens per forward pass on each rank, visual tokens and padding included; null: no limit. auto:
    on a GPU the number that fits its memory by the plan, halved once if it does not fit; on the CPU 2,048."""
    kept_chunks: NonNegativeInt | Literal["auto"] = "auto"
    """Number of chunks that keep their graph and skip the second forward pass: faster, more memory, same gradient.
    auto: on a GPU as many as fit its memory; elsewhere one, which does not raise the peak."""
    reuse_vision: Literal["no", "step", "disk"] = "step"
    """Runs a frozen vision encoder twice per step, once per step, or once per image (features in the cache folder,
    about 3 KB per visual token)."""
    merge_equal: bool = True
    """Equal inputs of one side of a batch are encoded once. With dropout they then share its mask."""
    learning_rate: float = Field(default=2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=0.02, gt=0)
    bf16: bool | None = None
    """Trains under autocast to bfloat16; null: if the hardware computes in bfloat16 natively."""
    seed: int = 42
    log_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    report_to: list[str] | None = None
    """Trackers of transformers, such as tensorboard; null: trackio if it is installed, else none. The run's own
    report.html is always written."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the trained weights, which is saved instead of the last weights; null: off."""
    sharding: Literal["none", "full"] = "none"
    """On several ranks: each rank holds the whole model (DDP), or parameters, gradients and optimizer state are sharded
    over the ranks (FSDP2)."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.sharding == "full" and self.ema_decay is not None:
            raise ValueError("sharding full does not support a moving average; set ema_decay to null")
        return self


class LossSettings(Section):
    """The loss; its temperature is `train.temperature`."""

    kind: str = "info_nce"
    """A name from `vlm2vec.losses.LOSSES`. `info_nce`: softmax over the batch; with several positives per query, the
    mean over them, none being a negative of another. `supcon`, `mil_nce`: the forms for several positives of these
    papers. `sigmoid`: SigLIP's, every pair is a binary decision."""
    also: dict[str, float] = {}
    """Losses from the same table with weights, added to `kind` from queries to targets: `soft_labels` for data with
    scores, `distillation` with a `teacher`."""
    hardness_alpha: float = Field(default=0.0, ge=0)
    """Hardness weighting: a negative counts exp(alpha * cosine) times, so alpha * cosine is added to its logit. LLaVE
    trains with 9 (arXiv 2503.04812). 0: off."""
    hardness_mode: Hardness = "all_negatives"
    """Which negatives are weighted: those of other queries, the query's own hard negatives, or all."""
    guide: str | None = None
    """A model whose cosines decide which negatives are masked (GISTEmbed): those that it finds closer to the query than
    the positive. null: none."""
    guide_margin: float = Field(default=0.0, ge=-2, le=2)
    """The guide's cosine must exceed the positive's by more than this."""
    teacher: str | None = None
    """A model whose similarities (`also: {distillation: 1}`) or vectors (`distill_vectors`) are the training target."""
    teacher_temperature: float = Field(default=0.02, gt=0)
    """Divides the teacher's cosines."""
    distill_vectors: float = Field(default=0.0, ge=0)
    """Weight of 1 - cosine(own vector, teacher's vector), which needs a teacher of the same dimension."""
    score_temperature: float = Field(default=1.0, gt=0)
    """Divides the data's scores before their softmax; read by `soft_labels`."""
    directions: Literal["query", "both"] = "query"
    """From queries to targets, as VLM2Vec trains; or the mean of that loss and the loss from targets to queries."""
    learn_temperature: bool = False
    """Learns the temperature, starting at `train.temperature`."""
    bias: float = -10.0
    """Initial bias of the sigmoid loss; -10 as in SigLIP."""
    learn_bias: bool = True
    """Learns the bias of the sigmoid loss."""
    matryoshka_dims: list[PositiveInt] | None = None
    """Dimensions to which vectors may be truncated later; the loss is the mean over them."""
    mask_equal_queries: bool = True
    """Targets of an equal query are not negatives."""
    mask_margin: float | None = Field(default=None, ge=-2, le=2)
    """Masks targets whose cosine exceeds the positive's by more than this: unlabelled positives. null: no mask."""

    @property
    def losses(self) -> dict[str, float]:
        """All losses by name with their weights."""
        return {self.kind: 1.0, **self.also}

    @model_validator(mode="after")
    def _consistent(self) -> LossSettings:
        for name in self.losses:
            if name not in LOSSES:
                raise ValueError(f"{name!r} is not a loss; expected one of {', '.join(LOSSES)}")
        if self.kind in self.also:
            raise ValueError(f"also: {self.kind} is already the kind; remove it from also")
        if self.hardness_alpha and self.kind == "sigmoid":
            raise ValueError("hardness_alpha has no effect on the sigmoid loss; set it to 0 or choose another kind")
        distills = self.distill_vectors > 0 or "distillation" in self.losses
        if distills != (self.teacher is not None):
            raise ValueError("teacher and a distillation loss (also.distillation or distill_vectors) need each other")
        return self


class EvaluateSettings(Section):
    """Evaluation during training, on all ranks."""

    benchmark: str
    """A shipped benchmark's name or a YAML file."""
    data: Path | None = None
    """Folder of the evaluation sets; null: the one that the benchmark's file names."""
    tasks: list[str] | None = None
    """Names; null: every task."""
    num_queries: int | None = Field(default=None, ge=1)
    """Number of queries of each task, from the first; null: all."""
    every_steps: int = Field(default=100, ge=1)
    """Interval of evaluations in steps; the last step is always evaluated."""
    at_start: bool = False
    """Also evaluates before the first step, to compare with the untrained model."""
    best_by: str = "overall"
    """Group of tasks; the checkpoint with its highest mean is kept in `best/`."""


class GuardSettings(Section):
    """Conditions that stop a run."""

    collapse_cosine: float = Field(default=0.9999, gt=0, le=1)
    """Mean cosine of different inputs above which the embeddings count as collapsed."""
    collapse_steps: PositiveInt = 50
    """Number of consecutive collapsed steps that stops the run."""
    memory_climb_mib: PositiveInt | None = None
    """Growth of memory after it has settled that stops the run (a step checkpoint is there); null: only recorded."""
    memory_settle_steps: PositiveInt = 20
    """Steps after which memory counts as settled."""


class Recipe(Section):
    """A whole run."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings | None = LoraSettings()
    data: DataSettings
    train: TrainSettings
    loss: LossSettings = LossSettings()
    evaluate: EvaluateSettings | None = None
    guard: GuardSettings = GuardSettings()
    output: Path

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.base == "compact-dual" and self.model.pooling != "last":
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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as `train.steps=100`.

    Without a `lora` section, a base that has an adapter is trained with the adapter's settings.

    Raises:
        UserError: for a missing file, invalid YAML, an unknown key, a bad value or a contradiction.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {shown(override)}: expected key=value, such as train.steps=100")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ValueError("expected a mapping with data, train and output")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return _with_adapter(Recipe.model_validate(OmegaConf.to_container(merged, resolve=True)))
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: not a valid recipe ({' '.join(str(error).split())[:200]})") from error


def _with_adapter(recipe: Recipe) -> Recipe:
    """The recipe with the LoRA settings of its base's adapter, unless it has its own."""
    if "lora" in recipe.model_fields_set or recipe.model.base == "compact":
        return recipe
    from vlm2vec.training.base_adapter import adapter_settings  # imports torch, which no other recipe needs here

    found = adapter_settings(recipe.model.base)
    return recipe.model_copy(update={"lora": LoraSettings(**found)}) if found else recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key {field}{did_you_mean(field, _keys(Recipe)) or '; remove it or check its spelling'}"
    return f"{field}: {first['msg']} (found {shown(first['input'])})" if first["loc"] else first["msg"]


def _keys(section: type[BaseModel]) -> list[str]:
    """Every key of a recipe, dotted."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [key for kind in kinds if issubclass(kind, Section) for key in _keys(kind)]
        keys += [name, *(f"{name}.{key}" for key in inner)]
    return keys
