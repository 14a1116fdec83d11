r"""Trains the bypass of `compact`: from an image to the sentence vectors of what is said of it.

    python -m pretraining.photographs CLONES FOLDER
    python -m pretraining.image_sentences FOLDER WORDNET bypass.safetensors

A contrastive loss in both directions over batches of images and one of the texts of each; the vision encoder and the
sentence encoder are frozen, so features and text vectors are computed once. Prints how often a held-out photograph is
found by its text, and the checksum of the file.

Shapes: N images, T visual tokens, F features, D embedding dim, C classes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pretraining.class_names import names_in_wordnet
from pretraining.photographs import LIST
from vlm2vec.cache import cache_folder
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.model import DEFAULTS, Bypass
from vlm2vec.models.backbones.compact.parts import SENTENCE_LAYERS, EfficientNetLite, load_sentence_encoder
from vlm2vec.models.backbones.compact.seen_classes import SeenClasses
from vlm2vec.models.pooling import mean
from vlm2vec.models.vision.vision_cache import VisionCache, chunks

HELD_OUT, EPOCHS, BATCH_SIZE, MAX_TOKENS = 300, 15, 256, 48
LEARNING_RATE, WEIGHT_DECAY, DROPOUT, LOG_SCALE = 1e-3, 0.5, 0.5, 3.0


@torch.inference_mode()
def sentence_vectors(texts: Sequence[str], encoder: Any, tokenizer: Any) -> torch.Tensor:
    """Unit vectors of all-MiniLM-L6-v2, [N, D]."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # equal lengths need no padding
    vectors_ND = torch.empty(len(texts), encoder.config.hidden_size)
    for rows in chunks(order, 64):
        given = [texts[row] for row in rows]
        batch = tokenizer(given, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states_NLD = encoder(**batch).last_hidden_state
        vectors_ND[rows] = F.normalize(mean(states_NLD, batch["attention_mask"]), dim=-1)
    return vectors_ND.clone()


def train(bypass: Bypass, features_NTF: torch.Tensor, texts: Sequence[torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Trains a bypass on images and the vectors of their texts; returns the loss of each step.

    Args:
        bypass: A new one.
        features_NTF: Of the vision encoder.
        texts: Vectors of the texts of each image, [texts, D].
        seed: Of the order of the images, the choice of texts and dropout.
    """
    torch.manual_seed(seed)
    log_scale = torch.tensor(LOG_SCALE, requires_grad=True)
    parameters = [*bypass.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = [
        rows for _ in range(EPOCHS) for rows in torch.split(torch.randperm(len(texts)), BATCH_SIZE) if len(rows) > 1
    ]
    losses = []
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1 - step / len(batches))
        chosen = [texts[row][int(torch.randint(len(texts[row]), ()))] for row in rows.tolist()]
        scores = bypass(features_NTF[rows]) @ torch.stack(chosen).T * log_scale.exp()
        right = torch.arange(len(rows))
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    bypass.eval()
    return torch.stack(losses)


@torch.no_grad()
def found(bypass: Bypass, features_NTF: torch.Tensor, texts_ND: torch.Tensor) -> dict[str, float]:
    """Percent of texts whose image is among the first 1, 5 and 10 of all."""
    scores = texts_ND @ bypass(features_NTF).T
    ranks = (scores > scores.diag()[:, None]).sum(dim=1)
    return {f"hit@{k}": round(100 * float((ranks < k).float().mean()), 1) for k in (1, 5, 10)}


def write(bypass: Bypass, path: Path) -> str:
    """Writes the weights and the sentence vectors of the classes in float16; returns the SHA-256 of the file."""
    save_file({name: value.half().contiguous() for name, value in bypass.state_dict().items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(folder: str, wordnet: str, output: str) -> None:
    """Trains on the photographs of a folder and writes the first bypass."""
    rows = [json.loads(line) for line in (Path(folder) / LIST).read_text().splitlines()]
    encoder, tokenizer = load_sentence_encoder(SENTENCE_LAYERS, torch.float32)
    vision = EfficientNetLite(DEFAULTS["image_size"], DEFAULTS["visual_tokens"])
    cache = VisionCache(vision, vision.fingerprint(), cache_folder() / "vision")
    images = [ImageRef(path=str(Path(folder) / row["image"])) for row in rows]
    cache.warm(images)
    features_NTF = cache.features(images)
    vectors = sentence_vectors([text for row in rows for text in row["texts"]], encoder, tokenizer)
    texts = list(torch.split(vectors, [len(row["texts"]) for row in rows]))
    torch.manual_seed(0)
    order = torch.randperm(len(rows))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    held_texts = torch.stack([texts[row][min(1, len(texts[row]) - 1)] for row in held.tolist()])
    classes = sentence_vectors(names_in_wordnet(Path(wordnet)), encoder, tokenizer)
    bypass = Bypass(SeenClasses(vision.classifier, classes), DROPOUT).eval()
    print("held out, untrained:", found(bypass, features_NTF[held], held_texts), flush=True)
    train(bypass.train(), features_NTF[kept], [texts[row] for row in kept.tolist()])
    print("held out, trained:", found(bypass, features_NTF[held], held_texts), flush=True)
    print(write(bypass, Path(output)))


if __name__ == "__main__":
    main(*sys.argv[1:])
