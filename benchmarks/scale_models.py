"""A real but tiny model for measurements of scaling, and the server's memory with it."""

from __future__ import annotations

from pathlib import Path

import psutil
import transformers
from scale_toys import Work
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vlm2vec.models.embedder import Embedder
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings

SPECIAL = {"<pad>": 0, "<end>": 1}
ASKED_AT_ONCE = 100
DIM = 128


def write_model(folder: Path) -> None:
    """A CLIP with random weights in the layout of real ones; its tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({**SPECIAL, **{letter: i + 2 for i, letter in enumerate(letters)}}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.add_special_tokens(list(SPECIAL))
    built.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(letters) + 2, "max_position_embeddings": 64, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**sizes, **words, "bos_token_id": 1, "eos_token_id": 1, "projection_dim": DIM},
        vision_config={**sizes, "image_size": 28, "patch_size": 14, "projection_dim": DIM},
        projection_dim=DIM,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder)


def serving(folder: Path, rows: int) -> Work:
    """A server that is asked for `rows` distinct texts; its cache of vectors is full after a few thousand."""
    write_model(folder / "clip")
    embedder = Embedder.from_pretrained(str(folder / "clip"))
    process, used = psutil.Process(), []
    with TestClient(create_app(embedder, ServeSettings(model="clip", result_cache_bytes=4 << 20))) as client:
        for quarter in range(4):
            for start in range(quarter * rows // 4, (quarter + 1) * rows // 4, ASKED_AT_ONCE):
                texts = [f"text {number}" for number in range(start, start + ASKED_AT_ONCE)]
                answer = client.post("/v1/embeddings", json={"input": texts})
                assert answer.status_code == 200, answer.text
            used.append(process.memory_info().rss >> 20)
    return {f"MiB after {(quarter + 1) * rows // 4:,}": mib for quarter, mib in enumerate(used)}
