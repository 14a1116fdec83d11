"""Measures `Embedder.encode` against sentence-transformers, in inputs per second on the same checkpoint and inputs.

    python benchmarks/encode.py [--items 256] [--repeats 3] [--only mixed] [--threads 2]

Times are wall clock from inputs to vectors, best of interleaved repeats; images are JPEG files that are read in every
repeat. On a busy machine, `--cpu-time --threads 1` compares CPU time instead.

Cases:
    mixed     half texts, half image and text, with uneven lengths and sizes
    repeated  the inputs of `mixed`, each ten times in shuffled order
    text      texts only
    images    images only
Systems: vlm2vec and sentence-transformers 6.2 (`encode` with its defaults), each in float32 and in bfloat16. By default
vlm2vec uses bfloat16 if the CPU supports it natively; sentence-transformers uses the precision of the checkpoint, here
float32. The ratio x_sentence_transformers_CASE compares these defaults; the ratios that end in _float32 and _bfloat16
compare equal precision. Model: a LLaVA with random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vlm2vec import Embedder

CASES = ("mixed", "repeated", "text", "images")
SIDE, PATCH, WIDTH = 224, 16, 384
LETTERS = "abcdefghij klmnop qrstu vwxyz "
SPECIAL = ["<pad>", "<end>", "<image>"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Encode = Callable[[list[Any]], np.ndarray]


def write_llava(folder: Path) -> None:
    """Writes a folder in the layout of a real checkpoint; every token is a letter, an image has 196 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIAL)
    names = ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<end>", model_input_names=names
    ).save_pretrained(folder)
    sides = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(folder)
    about = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default"}
    (folder / "processor_config.json").write_text(json.dumps({**about, "num_additional_image_tokens": 1}))
    text = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=6,
        vocab_size=len(SPECIAL) + len(letters),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=2, image_seq_length=(SIDE // PATCH) ** 2
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def make_inputs(folder: Path, count: int) -> dict[str, list[Any]]:
    """Creates the inputs of every case in a form that both libraries accept: texts, or dicts of text and image path."""
    rng, shapes = random.Random(0), np.random.default_rng(0)
    folder.mkdir()
    words = ["".join(rng.choices(LETTERS, k=int(rng.lognormvariate(3.7, 0.8)) + 4)) for _ in range(2 * count)]
    images = []
    for i in range(count):
        size = (rng.randrange(240, 900), rng.randrange(240, 900))
        coarse = Image.fromarray(shapes.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        images.append(str(folder / f"{i}.jpg"))
        coarse.resize(size, Image.Resampling.BICUBIC).save(images[-1], quality=90)
    mixed: list[Any] = [words[i] if i % 2 else {"text": words[i], "image": image} for i, image in enumerate(images)]
    repeated = mixed * 10
    rng.shuffle(repeated)
    images = [{"image": image} for image in images]
    return {"mixed": mixed, "repeated": repeated, "text": words[count:], "images": images}


def systems(folder: Path) -> dict[str, Encode]:
    """Loads both libraries in both precisions from the same folder."""
    from sentence_transformers import SentenceTransformer

    base, saved = folder / "base", folder / "saved"
    base.mkdir()
    write_llava(base)
    Embedder.from_pretrained(base, device="cpu", dtype=torch.float32).save_pretrained(saved)
    found: dict[str, Encode] = {}
    for name, dtype in DTYPES.items():
        ours = Embedder.from_pretrained(saved, device="cpu", dtype=dtype)
        theirs = SentenceTransformer(str(saved), device="cpu", model_kwargs={"dtype": dtype})
        found[f"ours {name}"] = ours.encode
        found[f"sentence_transformers {name}"] = lambda inputs, theirs=theirs: np.asarray(
            theirs.encode(inputs, show_progress_bar=False, convert_to_tensor=True).float()
        )
    size = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {torch.get_num_threads()} threads", flush=True)
    return found


def measure(
    found: dict[str, Encode], inputs: list[Any], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the best time of each system in seconds, and its lowest cosine to sentence-transformers in float32."""
    seconds = dict.fromkeys(found, float("inf"))
    vectors: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, encode in found.items():
            since = clock()
            vectors[name] = encode(inputs)
            seconds[name] = min(seconds[name], clock() - since)
    plain = vectors["sentence_transformers float32"]
    plain = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    cosines = {
        name: float(((rows / np.linalg.norm(rows, axis=1, keepdims=True)) * plain).sum(axis=1).min())
        for name, rows in vectors.items()
    }
    return seconds, cosines


def ratios_of(case: str, seconds: dict[str, float]) -> dict[str, float]:
    """Returns the speedups over sentence-transformers, with defaults and with equal precision."""
    ours_dtype = "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
    theirs = seconds["sentence_transformers float32"]
    ratios = {f"x_sentence_transformers_{case}": theirs / seconds[f"ours {ours_dtype}"]}
    for name in DTYPES:
        ratio = seconds[f"sentence_transformers {name}"] / seconds[f"ours {name}"]
        ratios[f"x_sentence_transformers_{case}_{name}"] = ratio
    return {name: round(value, 2) for name, value in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    settings = parser.parse_args()
    clock = time.process_time if settings.cpu_time else time.perf_counter
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        found = systems(Path(name))
        inputs = make_inputs(Path(name) / "pictures", settings.items)
        for encode in found.values():
            encode(inputs["mixed"][:4])
        print(f"{'case':<10}{'system':<32}{'inputs/s':>10}{'lowest cosine':>15}")
        for case in [settings.only] if settings.only else CASES:
            seconds, cosines = measure(found, inputs[case], settings.repeats, clock)
            for system, best in seconds.items():
                speed = len(inputs[case]) / best
                print(f"{case:<10}{system:<32}{speed:>10.1f}{cosines[system]:>15.6f}", flush=True)
            if min(cosines.values()) < 0.999:
                sys.exit(f"{case}: cosine {min(cosines.values()):.6f}, expected 0.999 or more")
            ratios |= ratios_of(case, seconds)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
