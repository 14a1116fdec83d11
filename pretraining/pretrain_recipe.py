"""Settings of the pretraining of `compact`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class PretrainRecipe(BaseModel):
    """Data, model and schedule of the pretraining; pretraining/compact.yaml has the values that were used."""

    model_config = ConfigDict(extra="forbid")

    clipart: Path
    """Folder with the unpacked Debian packages openclipart-png and openclipart-svg."""
    stamps: Path
    """Folder with the unpacked Debian package tuxpaint-stamps-default."""
    wordnet: Path
    """Folder with the unpacked Debian package wordnet-base."""
    demo: Path
    """Root of the prepared demo benchmark (`vlm2vec data demo` prints it)."""
    scenes: Path
    """Folder for the composed images; images that already exist are reused."""
    output: Path
    """File for the trained parameters (float16 safetensors)."""
    visual_tokens: int = 9
    """Visual tokens per image."""
    image_size: int = 192
    """Side of the square input image in pixels."""
    num_layers: int = 4
    """Number of layers of the language model that are kept, counted from the input."""
    lora_rank: int = 64
    """Rank of the LoRA on the language model; alpha has the same value."""
    num_scenes: int = 8000
    """Number of composed images."""
    shares: dict[str, float]
    """Sampling share of each kind of row (name, scene, edit, titles, define, repeat)."""
    steps: int = 3000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Rows per step."""
    learning_rate: float = 1e-3
    """Peak learning rate (AdamW)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 600
    """Steps of linear decay to zero at the end; the learning rate is constant in between."""
    in_turn_every: int = 4
    """Compute the autoregressive loss in every Nth step; the parallel loss is computed in every step."""
    feature_dropout: float = 0.1
    """Dropout probability of the visual features."""
    eval_every: int = 100
    """Steps between evaluations; each also writes a checkpoint."""
    num_held_out: int = 150
    """Number of drawings, and of scenes, that are excluded from training and used for evaluation."""
    seed: int = 0
    """Seed of the corpus, the batches and the initialization."""
