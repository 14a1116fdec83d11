"""Settings of the pretraining of `compact`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class PretrainRecipe(BaseModel):
    """What is read, what learns, how long; pretraining/compact.yaml is what was run."""

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
    """Composed images are drawn here."""
    output: Path
    """What was learned is written here, float16 safetensors."""
    visual_tokens: int = 9
    image_size: int = 192
    num_layers: int = 4
    lora_rank: int = 64
    num_scenes: int = 8000
    shares: dict[str, float]
    """Shares of the kinds of rows in a batch."""
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int = 600
    """The rate is constant, then falls to zero over the last so many steps."""
    in_turn_every: int = 4
    """In every so many steps the answers are also read and predicted token by token."""
    feature_dropout: float = 0.1
    eval_every: int = 100
    num_held_out: int = 150
    seed: int = 0
