"""Closed forms of FLOPs and bytes. A multiply-add in a matrix product counts as 2 FLOPs; other work is below 1 %.

Activation bytes per token of a layer were counted with torch's saved-tensor hooks for six sizes of Qwen2-VL under
bfloat16 autocast, with adapters on all linear layers, and fitted (largest residual 0.4 %): 24.75 per unit of the hidden
width, 8.29 per unit of the feed-forward width, 4.08 per unit of the key width. tests/planning checks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm2vec.planning.geometry import Geometry, ImageCost

GIB = 2**30
ACTIVATION_BYTES = (24.75, 8.29, 4.08)
HEAD_NORM_BYTES = 7.0
"""Activation bytes per unit of query and key width if heads are normalized; from counts of Qwen3-VL."""
DORA_ACTIVATIONS = 1.9
"""Factor for activations with DoRA, which keeps the base product of each linear layer twice; counts of six models give
1.75 to 2.0."""
WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.5625}
"""Bytes per frozen weight with `model.quantize`; nf4 has a 4-byte scale for each 64 weights."""
TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True)
class Training:
    """The settings of a run that determine its cost.

    Attributes:
        pairs: Pairs in the global batch.
        steps: Number of steps.
        chunk_tokens: Tokens of a mini-batch on one GPU.
        rank: LoRA rank; 0: full fine-tuning.
        dropout: LoRA dropout.
        dora: Whether DoRA is on.
        checkpointing: Whether activations are recomputed in the backward pass.
        reuses_vision: Whether a frozen vision encoder runs only once per step.
        sharded: Whether parameters, gradients and optimizer state are sharded over the GPUs.
        weight_bytes: Bytes per frozen weight of the language model's layers.
    """

    pairs: int
    steps: int
    chunk_tokens: int
    rank: int = 8
    dropout: float = 0.0
    dora: bool = False
    checkpointing: bool = False
    reuses_vision: bool = True
    sharded: bool = False
    weight_bytes: float = 2.0


@dataclass(frozen=True)
class Inputs:
    """Content of an average pair. The defaults are assumptions for the case that there is no data to sample.

    Attributes:
        texts: Mean number of text tokens of each input (query, target, then negatives).
        images: Mean number of images of each input.
        size: Width and height of an image in pixels.
    """

    texts: tuple[float, ...] = (40, 16)
    images: tuple[float, ...] = (1, 0)
    size: tuple[int, int] = (640, 480)


def parameters(model: Geometry) -> dict[str, int]:
    """Returns the number of parameters by component, without norms and biases."""
    decoder, vision = model.decoder, model.vision
    return {
        "language model": decoder.layers * decoder.layer_parameters,
        "token embeddings": decoder.vocabulary * decoder.hidden,
        "vision encoder": vision.held - vision.projector,
        "projector": vision.projector,
    }


def adapter_parameters(model: Geometry, rank: int) -> int:
    """Returns the number of LoRA parameters on all linear layers of the language model: rank * (in + out) per layer."""
    decoder = model.decoder
    return decoder.layers * rank * (decoder.adapted_inputs + decoder.adapted_outputs)


def decoder_flops(model: Geometry, tokens: int, rank: int = 0) -> int:
    """One forward pass of an input of `tokens` tokens. The last layer runs at the last token only, but for keys, values
    and attention; layers whose parts have other names (Phi-3) run at every token.
    """
    decoder = model.decoder
    per_token = decoder.layer_parameters + adapter_parameters(model, rank) // decoder.layers
    flops = 2 * tokens * decoder.layers * per_token + decoder.layers * 4 * tokens**2 * decoder.queries
    by_token = decoder.hidden * (2 * decoder.queries + 3 * decoder.inner)
    by_token += rank * (2 * (decoder.hidden + decoder.queries) + 3 * (decoder.hidden + decoder.inner))
    return flops - 2 * (tokens - 1) * by_token


def vision_flops(model: Geometry, image: ImageCost) -> int:
    """Returns the FLOPs of a forward pass of vision encoder and projector over an image."""
    vision = model.vision
    layers = image.patches * vision.layer_parameters * 2
    layers += 4 * image.patches**2 // image.sequences * vision.width
    embed = 2 * image.patches * vision.patch
    return vision.layers * layers + embed + 2 * vision.projections * (image.patches // vision.per_token)


@dataclass(frozen=True)
class Flops:
    """FLOPs by component."""

    vision: int
    language_forward: int
    language_backward: int

    @property
    def total(self) -> int:
        """Sum over all components."""
        return self.vision + self.language_forward + self.language_backward


def lengths(model: Geometry, inputs: Inputs) -> list[int]:
    """Returns the number of tokens of each input of a pair."""
    image = model.image(*inputs.size)
    return [round(text + count * image.tokens) for text, count in zip(inputs.texts, inputs.images, strict=True)]


def step_flops(model: Geometry, training: Training, inputs: Inputs) -> Flops:
    """Returns the FLOPs of a step over the global batch.

    GradCache runs the language model forward twice, activation checkpointing a third time. The backward pass costs the
    FLOPs of a forward pass for the states, and the same again for trained weights.
    """
    forward = sum(decoder_flops(model, tokens, training.rank) for tokens in lengths(model, inputs))
    images = round(sum(inputs.images) * vision_flops(model, model.image(*inputs.size)))
    passes = 2 + int(training.checkpointing)
    base = sum(decoder_flops(model, tokens) for tokens in lengths(model, inputs))
    backward = 2 * forward if training.rank == 0 else base + 2 * (forward - base)
    if training.dora:  # the base product is computed twice
        forward, backward = forward + base, backward + base
    frozen = training.rank > 0
    images *= (1 if training.reuses_vision else 2) if frozen else 4
    pairs = training.pairs
    return Flops(pairs * images, pairs * passes * forward, pairs * backward)


def forward_flops(model: Geometry, inputs: Inputs) -> int:
    """Returns the FLOPs of encoding every input of a pair once."""
    images = round(sum(inputs.images) * vision_flops(model, model.image(*inputs.size)))
    return images + sum(decoder_flops(model, tokens) for tokens in lengths(model, inputs))


def layer_bytes(model: Geometry, dropout: bool = False, dora: bool = False, mask_bytes: int = 1) -> float:
    """Returns the activations that a layer keeps for its backward pass, in bytes per token.

    Args:
        model: The model.
        dropout: Whether LoRA has dropout, whose mask is kept for each input of a linear layer.
        dora: Whether DoRA is on.
        mask_bytes: Bytes per element of that mask: 1 on CUDA, 4 on the CPU.
    """
    d = model.decoder
    kept = sum(factor * size for factor, size in zip(ACTIVATION_BYTES, (d.hidden, d.inner, d.keys), strict=True))
    kept += HEAD_NORM_BYTES * (d.queries + d.keys) if d.norms_heads else 0
    kept *= DORA_ACTIVATIONS if dora else 1
    return kept + (mask_bytes * d.adapted_inputs if dropout else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by use."""

    weights: float
    trained: float
    activations: float
    vision: float
    reserve: float

    @property
    def total(self) -> float:
        """The peak, the sum over all uses."""
        return self.weights + self.trained + self.activations + self.vision + self.reserve


def training_memory(model: Geometry, training: Training, inputs: Inputs, count: int = 1) -> Memory:
    """Returns the peak memory of one GPU while a mini-batch keeps its graph."""
    total = sum(parameters(model).values())
    shards = count if training.sharded else 1
    if training.rank:
        saved = (2.0 - training.weight_bytes) * parameters(model)["language model"]
        weights, trained = 2.0 * total - saved, float(TRAINED_BYTES * adapter_parameters(model, training.rank))
    else:  # autocast's bfloat16 copies in addition to the float32 weights
        weights, trained = 2.0 * total, float(TRAINED_BYTES * total)
    tokens = max(training.chunk_tokens, *lengths(model, inputs))
    one = layer_bytes(model, training.dropout > 0, training.dora) * tokens
    if training.checkpointing:
        activations = model.decoder.layers * 2 * model.decoder.hidden * tokens + one
    else:
        activations = model.decoder.layers * one
    return Memory(
        weights / shards, trained / shards, activations, _vision_bytes(model, tokens, inputs), _reserve(total)
    )


def encoding_memory(model: Geometry, batch_tokens: int, inputs: Inputs) -> Memory:
    """Returns the peak memory of one GPU that encodes: weights in bfloat16 and the working memory of a layer."""
    total = sum(parameters(model).values())
    tokens = max(batch_tokens, *lengths(model, inputs))
    working = tokens * 2.0 * (4 * model.decoder.hidden + 3 * model.decoder.inner)
    return Memory(2.0 * total, 0.0, working, _vision_bytes(model, tokens, inputs), _reserve(total))


def _vision_bytes(model: Geometry, tokens: int, inputs: Inputs) -> float:
    """Returns the working memory of a frozen encoder's layer for all images of a mini-batch."""
    image = model.image(*inputs.size)
    num_images = max(1, tokens // max(1, image.tokens)) if sum(inputs.images) else 0
    return num_images * image.patches * 2.0 * (6 * model.vision.width + 2 * model.vision.inner)


def _reserve(total: int) -> float:
    """Returns an allowance for the CUDA context, libraries and fragmentation."""
    return 1.0 * GIB + 0.05 * 2 * total
