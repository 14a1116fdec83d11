r"""Pretrains `compact`: teaches its truncated language model to read images, with language-modelling losses only.

    python -m pretraining.pretrain pretraining/compact.yaml

A row is `<image>\n{prompt}\n<end> {answer}<end>`. There are two losses, both cross entropies over the vocabulary:

- autoregressive ("in turn"): the answer token by token, as usual;
- parallel ("at once"): all tokens of the answer from the hidden state of the first end token (parallel prediction as in
  CapPa, arXiv 2306.07915, with a higher weight for rare tokens as in SuperClass, arXiv 2411.03313).

The parallel loss forces the content of the answer into that one state, which becomes the embedding. It is the cheaper
loss and is computed in every step, the autoregressive loss in every `in_turn_every`-th step. The projector, the final
norm and a LoRA on the language model are trained and shipped together with a head that whitens the states. Training
writes a checkpoint at every evaluation and resumes from it after an interruption.

Shapes: B rows, L tokens, A answer tokens of all rows, V vocabulary, D embedding dim.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from pretraining.captions import Caption
from pretraining.pretrain_data import RowBatch, Rows, read_corpus
from pretraining.pretrain_recipe import PretrainRecipe
from vlm2vec.cache import cache_folder
from vlm2vec.models.backbones.compact.model import CompactModel, make_projector
from vlm2vec.models.backbones.compact.parts import EfficientNetLite, load_language
from vlm2vec.models.backbones.compact.processing import LANGUAGE_LINEARS
from vlm2vec.models.device import best_dtype
from vlm2vec.models.vision.vision_cache import VisionCache, chunks

NUM_WHITENED = 768
START_SCALE = 0.2


class Pretrainer:
    """Trains the truncated language model (through LoRA) and the projector on the rows of the corpus.

    To train another model on the same rows, override `build`, `image_ids`, `head`, `states` and `write`; nothing else
    depends on the model.

    Attributes:
        spent: CPU time of the training steps in seconds, summed over all resumed runs; time before the first step is
            not counted.
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.dtype = best_dtype(torch.device("cpu"))
        self.model, tokenizer, self.cache = self.build()
        self.learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.learned.values():
            parameter.data = parameter.data.float()  # small updates would be rounded away in bfloat16
        self.rows = Rows(read_corpus(recipe, self.cache), tokenizer, self.image_ids(tokenizer))
        self.optimizer = torch.optim.AdamW(self.learned.values(), lr=recipe.learning_rate, betas=(0.9, 0.98))
        self.spent, self._looked = 0.0, time.process_time()

    def build(self) -> tuple[Any, Any, VisionCache]:
        """Builds the model, its tokenizer and the cache of visual features."""
        recipe = self.recipe
        language, tokenizer = load_language(recipe.num_layers, self.dtype)
        language.requires_grad_(False)
        config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=LANGUAGE_LINEARS)
        inject_adapter_in_model(config, language)
        language.norm.float().requires_grad_(True)
        # The states of the truncated model have too large a norm for the tied head: the initial loss is 29 instead of
        # log V = 11.
        language.norm.weight.data.mul_(START_SCALE)
        vision = EfficientNetLite(recipe.image_size, recipe.visual_tokens)
        model = CompactModel(vision, make_projector(vision, language, tokenizer), language)
        model.head.requires_grad_(False)  # computed at the end, not trained
        return model, tokenizer, VisionCache(vision, vision.fingerprint(), cache_folder() / "vision")

    def image_ids(self, tokenizer: Any) -> list[int]:
        """Returns the placeholder token ids of an image."""
        return [self.model.image_token_id] * self.recipe.visual_tokens

    def losses(self, rows: Sequence[Caption], batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the autoregressive loss, the parallel loss, and the logits [B, V] of the parallel prediction."""
        hidden_BLD = self.states(rows, batch)
        follows_BL = batch.labels_BL[:, 1:] != -100
        ends_BD = hidden_BLD[torch.arange(len(rows)), batch.ends_B]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            logits_AV = hidden_BLD[:, :-1][follows_BL] @ self.head().T
            scores_BV = (ends_BD @ self.head().T).float()
        in_turn = hidden_BLD.new_zeros(())
        if len(logits_AV):
            in_turn = F.cross_entropy(logits_AV.float(), batch.labels_BL[:, 1:][follows_BL])
        logs_BV = scores_BV.log_softmax(dim=-1)
        at_once = hidden_BLD.new_zeros(())
        for i, answer in enumerate(batch.answers):
            words = torch.tensor(sorted(set(answer)))
            weights = self.rows.rarity[words]
            at_once = at_once - (weights * logs_BV[i, words]).sum() / weights.sum() / len(rows)
        return in_turn, at_once, scores_BV

    def states(self, rows: Sequence[Caption], batch: RowBatch) -> torch.Tensor:
        """Returns the states after the final norm [B, L, D]; training applies dropout to the visual features."""
        images = [row.image for row in rows if row.image]
        features = self.cache.features(images).float() if images else None
        if features is not None and self.model.training:
            features = F.dropout(features, self.recipe.feature_dropout)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            hidden: torch.Tensor = self.model.states(batch.ids_BL, batch.mask_BL, features)
        return hidden.float()

    def head(self) -> torch.Tensor:
        """Returns the language-modelling head [V, D]: SmolLM2 ties its head to the token embeddings."""
        weight: torch.Tensor = self.model.language_model.get_input_embeddings().weight
        return weight

    @torch.no_grad()
    def held_out(self) -> str:
        """Returns the losses on held-out images by kind, and how often the most likely token occurs in the answer."""
        self.model.eval()
        told = []
        for kind, rows in sorted(self.rows.corpus.held_out.items()):
            in_turn = at_once = right = 0.0
            chosen = random.Random(0).sample(rows, min(128, len(rows)))
            for part in chunks(chosen, self.recipe.batch_size):
                batch = self.rows.encode(part)
                turn, once, scores_BV = self.losses(part, batch)
                first_B = scores_BV.argmax(dim=-1).tolist()
                in_turn += float(turn) * len(part) / len(chosen)
                at_once += float(once) * len(part) / len(chosen)
                right += sum(f in a for f, a in zip(first_B, batch.answers, strict=True)) / len(chosen)
            told.append(f"{kind}: autoregressive {in_turn:.3f}, parallel {at_once:.3f}, top token correct {right:.3f}")
        self.model.train()
        return "; ".join(told)

    @torch.no_grad()
    def describe(self, caption: Caption, max_tokens: int = 12) -> str:
        """Returns the model's answer to a row, decoded greedily."""
        self.model.eval()
        batch = self.rows.encode([caption])
        question = batch.ids_BL[0, : int(batch.ends_B[0]) + 1].tolist()
        said: list[int] = []
        while len(said) < max_tokens:
            row = torch.tensor([question + said])
            states = self.states([caption], RowBatch(row, torch.ones_like(row), row, batch.ends_B, []))
            token = int((states[0, -1].to(self.head().dtype) @ self.head().T).argmax())
            if token == self.rows.end:
                break
            said.append(token)
        self.model.train()
        return str(self.rows.tokenizer.decode(said))

    @torch.no_grad()
    def whitening_head(self) -> dict[str, torch.Tensor]:
        """Returns a linear map that whitens the states of the end tokens (zero mean, equal variance per direction).

        The states of a truncated language model have a cosine similarity close to 1 for all inputs, which contrastive
        training would have to correct first. Source: BERT-whitening (arXiv 2103.15316); a tenth of the mean variance
        is added to every direction so that noise is not amplified.
        """
        self.model.eval()
        rng, train = random.Random(self.recipe.seed), self.rows.corpus.train
        sides = [train["name"] + train["scene"], train["titles"]]  # half images, half texts
        parts = []
        for rows in sides:
            for part in chunks(rng.sample(rows, min(NUM_WHITENED, len(rows))), self.recipe.batch_size):
                batch = self.rows.encode(part, answered=False)
                parts.append(self.states(part, batch)[torch.arange(len(part)), batch.ends_B])
        states_ND = torch.cat(parts)
        mean_D = states_ND.mean(dim=0)
        variances_D, directions_DD = torch.linalg.eigh(torch.cov((states_ND - mean_D).T))
        scales_D = (variances_D + 0.1 * variances_D.mean()).rsqrt()
        weight_DD = scales_D[:, None] * directions_DD.T
        self.model.train()
        return {"head.weight": weight_DD, "head.bias": -weight_DD @ mean_D}

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, constant, then linear decay to zero."""
        recipe = self.recipe
        return recipe.learning_rate * min(
            1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / recipe.decay_steps
        )

    def step(self, step: int) -> tuple[float, float]:
        """Performs one update; returns both losses before it. The autoregressive loss is 0 in steps that skip it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        torch.manual_seed(self.recipe.seed + step)
        rows = self.rows.draw(step, self.recipe)
        answered = step % self.recipe.in_turn_every == 0
        in_turn, at_once, _ = self.losses(rows, self.rows.encode(rows, answered))
        self.optimizer.zero_grad()
        torch.autograd.backward(in_turn + at_once)
        torch.nn.utils.clip_grad_norm_(list(self.learned.values()), 1.0)
        self.optimizer.step()
        now = time.process_time()
        self.spent, self._looked = self.spent + now - self._looked, now
        return in_turn.item(), at_once.item()

    def finished(self, step: int) -> bool:
        """Returns whether training is finished after `step` steps."""
        return step >= self.recipe.steps

    def save(self, step: int) -> None:
        """Writes the model and, in a second file, the state needed to resume."""
        self.write()
        learned = {name: value.detach() for name, value in self.learned.items()}
        moments = {
            f"{n}/{key}": value for n, p in self.learned.items() for key, value in self.optimizer.state[p].items()
        }
        run = {"step": torch.tensor(step), "spent": torch.tensor(self.spent, dtype=torch.float64)}
        _replace(self._state_path, learned | moments | run)

    def write(self) -> None:
        """Writes the trained parameters and the whitening head in float16."""
        learned = {name: value.detach() for name, value in self.learned.items()}
        shipped = {name: value.half().contiguous() for name, value in (learned | self.whitening_head()).items()}
        _replace(self.recipe.output, shipped)

    def resume(self) -> int:
        """Loads the last checkpoint, if there is one; returns the next step."""
        if not self._state_path.is_file():
            return 0
        state = load_file(self._state_path)
        for name, parameter in self.learned.items():
            parameter.data.copy_(state[name])
            if f"{name}/step" in state:  # absent until the first step with images
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {key: state[f"{name}/{key}"] for key in keys}
        self.spent = float(state.get("spent", 0.0))
        return int(state["step"])

    @property
    def _state_path(self) -> Path:
        return self.recipe.output.with_suffix(".resume.safetensors")


def _replace(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside)
    beside.replace(path)


def pretrain(trainer: Pretrainer) -> None:
    """Runs the pretraining to its last step; prints losses and the model's answers for held-out images."""
    recipe = trainer.recipe
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    for side in ("train", "held_out"):
        print(side, {kind: len(rows) for kind, rows in getattr(trainer.rows.corpus, side).items()}, flush=True)
    step, since = trainer.resume(), time.time()
    seen: list[tuple[float, float]] = []
    while not trainer.finished(step):
        seen.append(trainer.step(step))
        step += 1
        if step % recipe.eval_every == 0 or trainer.finished(step):
            trainer.save(step)
            seconds = f"{time.time() - since:.0f} s, {trainer.spent:.0f} s of CPU time"
            in_turn, at_once = (sum(losses) / len(seen) for losses in zip(*seen, strict=True))
            losses = f"autoregressive {in_turn * recipe.in_turn_every:.3f}, parallel {at_once:.3f}"
            print(f"step {step}/{recipe.steps} {losses} {seconds}", flush=True)
            print(f"   held out: {trainer.held_out()}", flush=True)
            for rows in trainer.rows.corpus.held_out.values():
                for row in rows[:: max(1, len(rows) // 3)]:
                    print(f"   {row.prompt} {row.answer!r} -> {trainer.describe(row)!r}", flush=True)
            seen = []


if __name__ == "__main__":
    pretrain(Pretrainer(PretrainRecipe.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))))
