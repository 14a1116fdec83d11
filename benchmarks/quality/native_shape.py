"""Compares `compact` with a small model of a class in transformers, pretrained on the same rows for the same CPU time,
then fine-tuned on the same pairs and scored.

    python benchmarks/quality/native_shape.py pretraining/compact.yaml --output runs/native --seconds 1680 \
        --set num_scenes=6000 --demo DEMO --photos PHOTOS

The class is Idefics3 (SmolVLM's network, without the package that its processor requires). Images of 192 px are split
into patches of 16 px, and 4 x 4 patches form a visual token, so an image has nine visual tokens as in `compact`. The
tokenizer is SmolLM2's. The token embeddings are SmolLM2's, reduced to a smaller width by their principal components;
all other weights are random, and all weights are trained. The stages are: pretraining; choosing a learning rate on
names held out of the demo's training sets; the demo; photographs; speed of both architectures. Each stage is saved, and
a restart continues after the last one. `--set` changes the recipe of the pretraining, `--tune` those of the
fine-tuning.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from demo_settings import hold_out
from photos import Bench, Scores
from tokenizers import AddedToken, processors

from pretraining.captions import Caption
from pretraining.pretrain import START_SCALE, Pretrainer, pretrain
from pretraining.pretrain_data import RowBatch
from pretraining.pretrain_recipe import PretrainRecipe
from vlm2vec import Embedder
from vlm2vec.data.mmeb.images import list_sets
from vlm2vec.data.mmeb.train_rows import read_train_set
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.parts import load_language
from vlm2vec.models.vision.patch_embed import use_matrix_products
from vlm2vec.models.vision.vision_cache import VisionCache
from vlm2vec.training.run import train
from vlm2vec.types import EmbeddingInput

HEAD_DIM, PATCH, DECAY = 64, 16, 0.25
GLOBAL = "<global-img>"
SPEED_INPUTS = 256
SPEED_STEPS = ("train.steps=25", "train.save_steps=25", "train.warmup_steps=1")
RECIPES = Path(__file__).parents[2] / "recipes"


class NativeRecipe(PretrainRecipe):
    """Pretraining recipe; `num_layers` is that of the language model, and `steps` is an upper limit."""

    seconds: float
    """CPU time of the training in seconds; the learning rate decays over the last quarter."""
    width: int = 192
    vision_layers: int = 4


class NativePretrainer(Pretrainer):
    """Pretrains Idefics3 with all weights trainable."""

    recipe: NativeRecipe

    def build(self) -> tuple[Any, Any, VisionCache]:
        recipe = self.recipe
        language, words = load_language(1, torch.float32)
        self.processor = build_processor(words, recipe.image_size, recipe.visual_tokens)
        self.whole = build_model(recipe, self.processor.tokenizer)
        start_words(self.whole.get_input_embeddings().weight, language.get_input_embeddings().weight)
        self.whole.model.text_model.norm.weight.data.mul_(START_SCALE)
        use_matrix_products(self.whole)
        cache = VisionCache(self.pixels, f"pixels-{recipe.image_size}", recipe.output.parent / "pixels")
        return self.whole.model, self.processor.tokenizer, cache

    def image_ids(self, tokenizer: Any) -> list[int]:
        written = self.processor.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
        ids: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
        return ids

    def pixels(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Returns the images as resized by the processor, [N, 3, H, W], 0 to 255."""
        images = [[image.load()] for image in images]
        output = self.processor.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels_N1CHW: torch.Tensor = output["pixel_values"]
        return pixels_N1CHW[:, 0]

    def states(self, rows: Sequence[Caption], batch: RowBatch) -> torch.Tensor:
        seen: dict[str, torch.Tensor] = {}
        if images := [row.image for row in rows if row.image]:
            seen["pixel_values"] = (self.cache.features(images).float() / 127.5 - 1)[:, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            output = self.model(batch.ids_BL, attention_mask=batch.mask_BL, use_cache=False, **seen)
        hidden: torch.Tensor = output.last_hidden_state.float()
        return hidden

    def head(self) -> torch.Tensor:
        weight: torch.Tensor = self.whole.get_output_embeddings().weight  # tied
        return weight

    def learning_rate(self, step: int) -> float:
        left = 1 - self.spent / self.recipe.seconds
        return self.recipe.learning_rate * min(1.0, (step + 1) / self.recipe.warmup_steps, max(0.0, left / DECAY))

    def finished(self, step: int) -> bool:
        return super().finished(step) or self.spent >= self.recipe.seconds

    def write(self) -> None:
        """Writes the model folder with transformers."""
        beside = self.recipe.output.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        self.whole.save_pretrained(beside)
        self.processor.save_pretrained(beside)
        shutil.rmtree(self.recipe.output, ignore_errors=True)
        beside.rename(self.recipe.output)


def build_processor(words: Any, image_size: int, visual_tokens: int) -> Any:
    """Builds Idefics3's processor: one tile per image, SmolLM2's tokenizer with the end token after every text."""
    backend, end = words.backend_tokenizer, words.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, words.eos_token_id)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=end,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens([AddedToken(GLOBAL, special=True)])
    size = {"longest_edge": image_size}
    images = transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=visual_tokens)


def build_model(recipe: NativeRecipe, tokenizer: Any) -> Any:
    """Builds the model with random weights."""
    common = {"hidden_size": recipe.width, "num_attention_heads": recipe.width // HEAD_DIM}
    scale = recipe.image_size / PATCH / recipe.visual_tokens**0.5
    assert scale == int(scale), "image_size: expected a multiple of 16 px times the side of the grid of visual tokens"
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(
            **common,
            vocab_size=len(tokenizer),
            intermediate_size=recipe.width * 8 // 3,
            num_hidden_layers=recipe.num_layers,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,  # the end token; as padding its embedding would not learn
            tie_word_embeddings=True,
        ),
        vision_config={
            **common,
            "intermediate_size": recipe.width * 4,
            "num_hidden_layers": recipe.vision_layers,
            "image_size": recipe.image_size,
            "patch_size": PATCH,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=int(scale),
        tie_word_embeddings=True,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


@torch.no_grad()
def start_words(weight_VD: torch.Tensor, wide_WE: torch.Tensor) -> None:
    """Initializes token embeddings with the principal components of wider embeddings; new tokens start near the mean.

    Rows have a mean norm of 1, as with the usual random initialization.
    """
    centred_WE = wide_WE.float() - wide_WE.float().mean(dim=0)
    directions_EE = torch.linalg.eigh(centred_WE.T @ centred_WE).eigenvectors.flip(-1)
    narrow_WD = centred_WE @ directions_EE[:, : weight_VD.shape[1]]
    weight_VD.normal_(std=0.02)
    weight_VD[: len(narrow_WD)] = narrow_WD / narrow_WD.norm(dim=-1).mean()


def read_recipe(path: Path, output: Path, seconds: float, changes: Sequence[str]) -> NativeRecipe:
    """Reads the recipe of `compact`'s pretraining and applies this model's settings."""
    content = yaml.safe_load(path.read_text())
    content |= {"output": output / "model", "seconds": seconds, "learning_rate": 1e-3, "steps": 100_000}
    content |= {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)}
    return NativeRecipe.model_validate(content)


def tuning(name: str, model: Path, data: Path, output: Path, changes: Sequence[str]) -> Bench:
    """Returns runs of a shipped recipe with this model instead of `compact`, without LoRA."""
    settings = yaml.safe_load((RECIPES / name).read_text()) | {"model": {"base": str(model)}, "lora": None}
    output.mkdir(parents=True, exist_ok=True)
    (output / name).write_text(yaml.safe_dump(settings, sort_keys=False))
    return Bench(output / name, data, output, tuple(changes), (), ())


def choose_rate(bench: Bench, rates: Sequence[str], steps: int) -> str:
    """Returns the learning rate with the highest mean score on names held out of the demo's training sets."""
    root, held = hold_out(bench.data, bench.output / "held-out")
    found = {}
    for rate in rates:
        changes = [f"train.learning_rate={rate}", f"train.steps={steps}", f"train.save_steps={steps}"]
        scores = bench.run(f"select/{rate}", changes, root, held)
        found[changes[0]] = scores["overall"]
        print(told(f"held-out names, {rate}, {steps} steps", scores), flush=True)
    return max(found, key=lambda change: found[change])


def told(run: str, scores: Scores) -> str:
    """Returns hit@1 in percent by task and group, and the CPU time of the training."""
    shown = [f"{name} {100 * value:.1f}" for name, value in scores.items() if name != "cpu_seconds"]
    return f"{run}: {', '.join(shown)}; {scores.get('cpu_seconds', float('nan')):.0f} s of CPU time"


def speed(model: str, bench: Bench) -> str:
    """Returns a table row with pairs trained, images encoded and texts encoded per second of CPU time.

    Training uses cached features of a frozen vision encoder, as in every run but the first. Encoding decodes images.
    """
    embedder = Embedder.from_pretrained(model)
    rates = []
    for inputs in inputs_of(bench.data / "train"):
        embedder.encode(inputs[:8])
        since = time.process_time()
        embedder.encode(inputs)
        rates.append(f"{len(inputs) / (time.process_time() - since):.0f}")
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = bench.settings(SPEED_STEPS, bench.data / "train", Path(folder) / "run")
        train(settings, monitor=lambda *_: marks.append(time.process_time()))
    pairs = settings.train.batch_size * (len(marks) - 1) / (marks[-1] - marks[0])
    number = sum(parameter.numel() for parameter in embedder.backbone.model.parameters())
    return f"| {model} | {number / 1e6:.1f} M | {pairs:.1f} | {' | '.join(rates)} |"


def inputs_of(root: Path) -> tuple[list[EmbeddingInput], list[EmbeddingInput]]:
    """Returns the images and the texts of a folder's training sets as separate inputs."""
    pairs = [pair for name in list_sets(root) for pair in read_train_set(root, name)]
    sides = [side for pair in pairs for side in (pair.query, pair.target)]
    images = dict.fromkeys(EmbeddingInput(images=(image,)) for side in sides for image in side.images)
    texts = dict.fromkeys(side for side in sides if not side.images)
    return list(images)[:SPEED_INPUTS], list(texts)[:SPEED_INPUTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of the pretraining of compact")
    parser.add_argument("--output", type=Path, default=Path("runs/native"))
    parser.add_argument("--seconds", type=float, default=1680, help="CPU time of the pretraining in seconds")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tune", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--demo", type=Path, help="folder that `vlm2vec data demo` prints; without it, only pretrain")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rate", dest="rates", action="append", default=[], metavar="LEARNING_RATE")
    parser.add_argument("--choice-steps", type=int, default=200)
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    output = given.output.resolve()
    recipe = read_recipe(given.recipe, output, given.seconds, given.changes)
    pretrain(NativePretrainer(recipe))
    if given.demo is None:
        return
    demo = tuning("demo.yaml", recipe.output, given.demo.resolve(), output / "demo", given.tune)
    rate = choose_rate(demo, given.rates or ["3e-4", "1e-3"], given.choice_steps)
    print(told(f"demo, {rate}", demo.run("trained", [rate])), flush=True)
    if given.photos:
        photos = tuning("photos.yaml", recipe.output, given.photos.resolve(), output / "photos", given.tune)
        print(told(f"photos, {rate}", photos.run("trained", [rate])), flush=True)
    print("| model | parameters | pairs/s | images/s | texts/s |\n| --- | --: | --: | --: | --: |")
    print(speed(str(recipe.output), demo), flush=True)
    compact = Bench(RECIPES / "demo.yaml", demo.data, demo.output, demo.changes, (), ())
    print(speed("compact", compact))


if __name__ == "__main__":
    main()
