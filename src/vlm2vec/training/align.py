r"""Aligns `compact`: its cut language model learns to say what a picture shows, in a language-modelling loss only.

    python -m vlm2vec.training.align recipes/align-compact.yaml

`<picture>\n{prompt}\n<end>{answer}<end>`: the state of the first end token, which becomes the embedding, must carry
what the answer needs. Some rows have words in place of the picture and must repeat them, so that the state after words
and the state after a picture meet. The projector, the final norm and a LoRA on the language model learn; with a head
that whitens the states they are shipped together. A checkpoint is written at every evaluation, and a run that was
stopped goes on from it.

Shapes: B examples, L tokens, T visual tokens, V vocabulary, N answer tokens.
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
from peft import LoraConfig, inject_adapter_in_model
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from vlm2vec.cache import cache_folder
from vlm2vec.data.captions import NAME_PROMPT, Caption, clipart_captions, demo_captions, without_names
from vlm2vec.images import ImageRef
from vlm2vec.models.backbones.compact import LANGUAGE_LINEARS, CompactModel, Projector
from vlm2vec.models.backbones.compact_parts import EfficientNetLite, load_language
from vlm2vec.models.pooling import last_token
from vlm2vec.models.vision_cache import VisionCache, chunks


class AlignRecipe(BaseModel):
    """Settings of the alignment."""

    model_config = ConfigDict(extra="forbid")

    clipart: Path
    """Folder with the unpacked Debian packages openclipart-png and openclipart-svg."""
    demo: Path
    """Root of the prepared demo benchmark (`vlm2vec data demo` prints it)."""
    output: Path
    """What was learned is written here, float16 safetensors."""
    visual_tokens: int = 9
    image_size: int = 192
    num_layers: int = 4
    lora_rank: int = 16
    repeat_share: float = 0.25
    """Share of rows whose words are to be repeated instead of a picture described."""
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    eval_every: int = 100
    num_held_out: int = 200
    seed: int = 0


class Aligner:
    """The cut language model with its adapter, the projector, and the captions."""

    def __init__(self, recipe: AlignRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        language, self.tokenizer = load_language(recipe.num_layers, torch.float32)
        language.requires_grad_(False)
        config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=LANGUAGE_LINEARS)
        inject_adapter_in_model(config, language)
        language.norm.requires_grad_(True)
        vision = EfficientNetLite(recipe.image_size, recipe.visual_tokens)
        self.model = CompactModel(vision, Projector(language.config.hidden_size), language)
        self.model.head.requires_grad_(False)  # computed at the end, not trained
        self.cache = VisionCache(vision, vision.fingerprint(), cache_folder() / "vision")
        self._read_captions()
        self.learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.learned.values(), lr=recipe.learning_rate)

    def _read_captions(self) -> None:
        recipe = self.recipe
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

    def tokens(self, caption: Caption, repeat: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the question and of the answer, an end token after each; `repeat` asks with words, not a picture."""
        end = self.tokenizer.eos_token_id
        words = self.tokenizer(caption.answer, add_special_tokens=False)["input_ids"]
        if repeat:
            return [*words, end], [*words, end]
        prompt = self.tokenizer(f"\n{caption.prompt}\n", add_special_tokens=False)["input_ids"]
        return [self.model.image_token_id] * self.recipe.visual_tokens + [*prompt, end], [*words, end]

    def loss(self, captions: Sequence[Caption], num_repeats: int = 0) -> torch.Tensor:
        """Mean cross entropy a token of the answers; the first `num_repeats` rows repeat words."""
        rows = [self.tokens(caption, i < num_repeats) for i, caption in enumerate(captions)]
        ids_BL, mask_BL, labels_BL = _padded(rows)
        features = self.cache.features([caption.image for caption in captions[num_repeats:]])
        hidden_BLD = self.model.states(ids_BL, mask_BL, features)[:, :-1]
        answered_BL = labels_BL[:, 1:] != -100
        logits_NV = hidden_BLD[answered_BL] @ self._head.T
        return F.cross_entropy(logits_NV, labels_BL[:, 1:][answered_BL])

    @property
    def _head(self) -> torch.Tensor:
        weight: torch.Tensor = self.model.language_model.get_input_embeddings().weight
        return weight  # SmolLM2 ties its head to the embeddings

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on captions of pictures that were never trained on."""
        size = self.recipe.batch_size
        parts = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(self.held_out)

    @torch.no_grad()
    def describe(self, caption: Caption, max_tokens: int = 12) -> str:
        """What the aligned model says of a picture, greedily."""
        question, _ = self.tokens(caption)
        features = self.cache.features([caption.image])
        said: list[int] = []
        while len(said) < max_tokens:
            row = torch.tensor([question + said])
            token = int((self.model.states(row, torch.ones_like(row), features)[0, -1] @ self._head.T).argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
        return str(self.tokenizer.decode(said))

    @torch.no_grad()
    def whitening_head(self) -> dict[str, torch.Tensor]:
        """A linear map after which the states of end tokens have mean zero and no preferred direction.

        The states of a cut language model point almost the same way for every input, which
        contrastive training would have to undo first. Source: BERT-whitening (arXiv 2103.15316), here with a tenth
        of the mean variance added to every direction, so that noise is not blown up.
        """
        captions = random.Random(self.recipe.seed).sample(self.train_set, min(2048, len(self.train_set)))
        parts = []
        for part in chunks(captions, self.recipe.batch_size):
            for num_repeats in (0, len(part)):
                questions = [self.tokens(caption, num_repeats > 0)[0] for caption in part]
                ids_BL, mask_BL, _ = _padded([(question, []) for question in questions])
                features = self.cache.features([caption.image for caption in part]) if not num_repeats else None
                parts.append(last_token(self.model.states(ids_BL, mask_BL, features), mask_BL))
        states_ND = torch.cat(parts)
        mean_D = states_ND.mean(dim=0)
        variances_D, directions_DD = torch.linalg.eigh(torch.cov((states_ND - mean_D).T))
        scales_D = (variances_D + 0.1 * variances_D.mean()).rsqrt()
        weight_DD = scales_D[:, None] * directions_DD.T
        return {"head.weight": weight_DD, "head.bias": -weight_DD @ mean_D}

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
        """Writes what was learned (float16) and, beside it, what a resumed run needs."""
        shipped = {name: value.detach() for name, value in self.learned.items()}
        if step == self.recipe.steps:
            shipped |= self.whitening_head()
        shipped = {name: value.half().contiguous() for name, value in shipped.items()}
        moments = {
            f"{n}/{key}": value for n, p in self.learned.items() for key, value in self.optimizer.state[p].items()
        }
        whole = {
            **{name: value.detach() for name, value in self.learned.items()},
            **moments,
            "step": torch.tensor(step),
        }
        for path, tensors in ((self.recipe.output, shipped), (self._state_path, whole)):
            beside = path.with_suffix(".tmp")
            save_file(tensors, beside)
            beside.replace(path)

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; returns the next step."""
        if not self._state_path.is_file():
            return 0
        state = load_file(self._state_path)
        for name, parameter in self.learned.items():
            parameter.data.copy_(state[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: state[f"{name}/{key}"] for key in keys}
        return int(state["step"])

    @property
    def _state_path(self) -> Path:
        return self.recipe.output.with_suffix(".resume.safetensors")


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels [B, L] of questions with their answers; only answers are labels."""
    length = max(len(question) + len(answer) for question, answer in rows)
    ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for i, (question, answer) in enumerate(rows):
        size = len(question) + len(answer)
        ids_BL[i, :size] = torch.tensor(question + answer)
        mask_BL[i, :size] = 1
        labels_BL[i, len(question) : size] = torch.tensor(answer, dtype=torch.long)
    return ids_BL, mask_BL, labels_BL


def align(recipe: AlignRecipe) -> None:
    """Runs the alignment to its last step, printing losses and what the model says of unseen pictures."""
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    aligner = Aligner(recipe)
    print(f"{len(aligner.train_set)} captions to train on, {len(aligner.held_out)} held out", flush=True)
    first, since, running = aligner.resume(), time.time(), 0.0
    for step in range(first, recipe.steps):
        for group in aligner.optimizer.param_groups:
            group["lr"] = aligner.learning_rate(step)
        loss = aligner.loss(aligner.batch(step), round(recipe.batch_size * recipe.repeat_share))
        aligner.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(aligner.learned.values()), 1.0)
        aligner.optimizer.step()
        running += loss.item() / recipe.eval_every
        if (step + 1) % recipe.eval_every == 0:
            aligner.save(step + 1)
            line = f"step {step + 1}/{recipe.steps} loss {running:.3f} held-out {aligner.held_out_loss():.3f}"
            print(f"{line} {time.time() - since:.0f} s", flush=True)
            for caption in aligner.held_out[:: max(1, len(aligner.held_out) // 6)]:
                print(f"   {caption.prompt} {caption.answer!r} -> {aligner.describe(caption)!r}", flush=True)
            running = 0.0
    aligner.save(recipe.steps)


if __name__ == "__main__":
    align(AlignRecipe.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text())))
