r"""Aligns the projector of `compact`: the whole frozen SmolLM2 must say what a picture shows, from its visual tokens.

    python -m vlm2vec.training.align recipes/align-compact.yaml

Loss: next-token cross entropy of the answer, `<picture>\n{prompt}\n{answer}<end>`, over all 30 layers; only the
projector learns. `compact` then keeps the first layers of the same language model. A checkpoint is written at every
evaluation, and a run that was stopped goes on from it. Shapes: B examples, L tokens, T visual tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from vlm2vec.cache import cache_folder
from vlm2vec.data.captions import NAME_PROMPT, Caption, clipart_captions, demo_captions, without_names
from vlm2vec.images import ImageRef
from vlm2vec.models.backbones.compact import CompactModel, Projector
from vlm2vec.models.backbones.compact_parts import NUM_LAYERS, EfficientNetLite, load_language
from vlm2vec.models.vision_cache import VisionCache


class AlignRecipe(BaseModel):
    """Settings of the alignment."""

    model_config = ConfigDict(extra="forbid")

    clipart: Path
    """Folder with the unpacked Debian packages openclipart-png and openclipart-svg."""
    demo: Path
    """Root of the prepared demo benchmark (`vlm2vec data demo` prints it)."""
    output: Path
    """The projector is written here, float16 safetensors."""
    visual_tokens: int = 9
    image_size: int = 192
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    eval_every: int = 100
    num_held_out: int = 200
    seed: int = 0


class Aligner:
    """The frozen language model, the projector in training, and the captions."""

    def __init__(self, recipe: AlignRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        language, self.tokenizer = load_language(NUM_LAYERS, torch.float32)
        language.requires_grad_(False)
        vision = EfficientNetLite(recipe.image_size, recipe.visual_tokens)
        self.model = CompactModel(vision, Projector(language.config.hidden_size), language)
        self.cache = VisionCache(vision, vision.fingerprint(), cache_folder() / "vision")
        captions = without_names(clipart_captions(recipe.clipart), recipe.demo)
        captions += without_names(demo_captions(recipe.demo), recipe.demo)
        unreadable: set[ImageRef] = set()  # OpenClipart holds a few of more than 178 megapixels
        self.cache.warm((c.image for c in captions), on_error=lambda image, _: unreadable.add(image))
        captions = [caption for caption in captions if caption.image not in unreadable]
        pictures = list(dict.fromkeys(caption.image for caption in captions))
        random.Random(recipe.seed).shuffle(pictures)
        held_out = set(pictures[: recipe.num_held_out])  # by picture: no caption of it is trained on
        self.train_set = [caption for caption in captions if caption.image not in held_out]
        self.held_out = [caption for caption in captions if caption.image in held_out]
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=recipe.learning_rate)

    def loss(self, captions: Sequence[Caption]) -> torch.Tensor:
        """Mean cross entropy a token of the answers."""
        prompts, answers = [], []
        for caption in captions:
            prompts.append(self.tokenizer(f"\n{caption.prompt}\n", add_special_tokens=False)["input_ids"])
            words = self.tokenizer(caption.answer, add_special_tokens=False)["input_ids"]
            answers.append([*words, self.tokenizer.eos_token_id])
        num_visual = self.recipe.visual_tokens
        length = num_visual + max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids_BL = torch.zeros(len(captions), length, dtype=torch.long)
        mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = [self.model.image_token_id] * num_visual + prompt + answer
            ids_BL[i, : len(row)] = torch.tensor(row)
            mask_BL[i, : len(row)] = 1
            labels_BL[i, len(row) - len(answer) : len(row)] = torch.tensor(answer)
        features = self.cache.features([caption.image for caption in captions])
        hidden_BLD = self.model(ids_BL, mask_BL, features)[:, :-1]
        predicted = labels_BL[:, 1:] != -100
        embed = self.model.language_model.get_input_embeddings()
        logits_NV = hidden_BLD[predicted] @ embed.weight.T  # SmolLM2 ties its head to the embeddings
        return F.cross_entropy(logits_NV, labels_BL[:, 1:][predicted])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on captions of pictures that were never trained on."""
        size = self.recipe.batch_size
        parts = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(self.held_out)

    @torch.no_grad()
    def describe(self, caption: Caption, max_tokens: int = 12) -> str:
        """What the aligned model says of a picture, greedily."""
        text = self.tokenizer(f"\n{caption.prompt}\n", add_special_tokens=False)["input_ids"]
        ids = [self.model.image_token_id] * self.recipe.visual_tokens + text
        features = self.cache.features([caption.image])
        said: list[int] = []
        embed = self.model.language_model.get_input_embeddings()
        while len(said) < max_tokens:
            row = torch.tensor([ids + said])
            token = int((self.model(row, torch.ones_like(row), features)[0, -1] @ embed.weight.T).argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
        return str(self.tokenizer.decode(said))

    def batch(self, step: int) -> list[Caption]:
        """Captions of a step: a pure function of seed and step, so that a resumed run sees the same ones.

        All of one kind (names, or questions), so that little is padding.
        """
        rng = random.Random(f"{self.recipe.seed}-{step}")
        kind = rng.choice(self.train_set).prompt == NAME_PROMPT
        same_kind = [caption for caption in self.train_set if (caption.prompt == NAME_PROMPT) == kind]
        return rng.sample(same_kind, self.recipe.batch_size)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero."""
        recipe = self.recipe
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))

    def save(self, step: int) -> None:
        """Writes the projector (float16) and, beside it, what a resumed run needs."""
        weights = self.model.projector.state_dict()
        for path, tensors in (
            (self.recipe.output, {name: value.half().contiguous() for name, value in weights.items()}),
            (self._state_path, {**weights, **self._moments(), "step": torch.tensor(step)}),
        ):
            beside = path.with_suffix(".tmp")
            save_file(tensors, beside)
            beside.replace(path)

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; returns the next step."""
        if not self._state_path.is_file():
            return 0
        state = load_file(self._state_path)
        names = [name for name, _ in self.model.projector.named_parameters()]
        self.model.projector.load_state_dict({name: state[name] for name in names})
        for name, parameter in self.model.projector.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: state[f"{name}/{key}"] for key in keys}
        return int(state["step"])

    @property
    def _state_path(self) -> Path:
        return self.recipe.output.with_suffix(".resume.safetensors")

    def _moments(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.projector.named_parameters())
        return {f"{n}/{key}": value for n, p in parameters.items() for key, value in self.optimizer.state[p].items()}


def align(recipe: AlignRecipe) -> None:
    """Runs the alignment to its last step, printing losses and what the model says of unseen pictures."""
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    aligner = Aligner(recipe)
    print(f"{len(aligner.train_set)} captions to train on, {len(aligner.held_out)} held out", flush=True)
    first, since, running = aligner.resume(), time.time(), 0.0
    for step in range(first, recipe.steps):
        for group in aligner.optimizer.param_groups:
            group["lr"] = aligner.learning_rate(step)
        loss = aligner.loss(aligner.batch(step))
        aligner.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(aligner.model.projector.parameters(), 1.0)
        aligner.optimizer.step()
        running += loss.item() / recipe.eval_every
        if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps:
            aligner.save(step + 1)
            line = f"step {step + 1}/{recipe.steps} loss {running:.3f} held-out {aligner.held_out_loss():.3f}"
            print(f"{line} {time.time() - since:.0f} s", flush=True)
            for caption in aligner.held_out[:: max(1, len(aligner.held_out) // 6)]:
                print(f"   {caption.prompt} {caption.answer!r} -> {aligner.describe(caption)!r}", flush=True)
            running = 0.0


if __name__ == "__main__":
    align(AlignRecipe.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text())))
