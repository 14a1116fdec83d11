"""`PairModel`: a backbone that reads query and candidate in one prompt, with a head that gives one log-odds value.

Shapes: N pairs, D hidden size.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.files import write_json
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.card import write_card
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.pooling import pool
from vlm2vec.models.reranking.folder import HEAD_FILE, RerankerFile
from vlm2vec.models.reranking.head import answer_direction
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.scalar_head import HEADS, HeadKind, LinearHead, ProductHead, sides_of
from vlm2vec.types import EmbeddingInput


class PairModel(nn.Module):
    """Scores pairs by the pooled states of the prompt: that of its last token, or the base's pooling under a new head.

    The output of the encoding pipeline is one value for each pair instead of a vector.

    Args:
        embedder: The model; its backbone's template becomes that of the prompt, and its pooling "last" if the head is
            that of a language model.
        prompt: Wording of the prompt.
        head: Gives the log-odds.
        head_is_trained: Whether the head is a new layer that training changes. False for the rows of a language-model
            head.
    """

    embedding_dim = 1

    def __init__(
        self, embedder: Embedder, prompt: RerankPrompt, head: LinearHead, head_is_trained: bool = False
    ) -> None:
        super().__init__()
        backbone = decoder(embedder.backbone)
        self.embedder, self.prompt = embedder, prompt
        self.head = head.requires_grad_(head_is_trained)
        self.head_is_trained = head_is_trained
        chat = backbone.chat_template()
        self.has_chat = bool(chat)
        backbone.template = prompt.template(chat)
        if not head_is_trained:
            backbone.pooling = "last"

    @classmethod
    def of(cls, embedder: Embedder, prompt: RerankPrompt, new_head: HeadKind | None = None) -> PairModel:
        """Makes a reranker of a model: by its language-model head if its weights have one.

        Args:
            embedder: The model; its backbone is changed.
            prompt: Wording of the prompt.
            new_head: Kind of the head that a model without a language-model head gets, which is to be trained.

        Raises:
            UserError: for a dual encoder; if the model has no language-model head and `new_head` is None; or if it has
                one and `new_head` is another kind than linear.
        """
        backbone = decoder(embedder.backbone)
        direction_D = answer_direction(backbone, embedder.base, embedder.revision, prompt.answers)
        if direction_D is None and new_head is None:
            raise UserError(
                f"{embedder.base}: has no lm_head.weight; expected a model that generates text, or a trained reranker "
                "(a recipe with task: rerank)"
            )
        if direction_D is not None and new_head == "product":
            raise UserError(f"{embedder.base}: scores by its language-model head; remove rerank.head: product")
        head = HEADS[new_head or "linear"](backbone.pooled_dim)
        if direction_D is not None:
            with torch.no_grad():
                head.weight[0] = direction_D
        return cls(embedder, prompt, head, direction_D is None).to(embedder.device)

    @property
    def backbone(self) -> Backbone:
        """The network and its processor."""
        return self.embedder.backbone

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedder.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base weights."""
        return self.embedder.dtype

    def pair(self, query: EmbeddingInput, candidate: EmbeddingInput) -> EmbeddingInput:
        """Combines query and candidate to one input, see `RerankPrompt.pair`."""
        return self.prompt.pair(query, candidate, self.has_chat)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Log-odds of a batch of pairs, [N, 1] in float32."""
        if not isinstance(self.head, ProductHead):
            return self.head(self.backbone(batch))  # type: ignore[no-any-return]
        mask_NL, backbone = batch["attention_mask"], decoder(self.backbone)
        states_NLD = backbone.hidden_states(batch)
        masks = (*sides_of(batch["input_ids"], mask_NL), mask_NL)
        query_NP, candidate_NP, whole_NP = (pool(backbone.pooling, states_NLD, mask) for mask in masks)
        return self.head.compare(query_NP, candidate_NP, whole_NP)

    def write_files(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the reranker's files into an existing folder, see `folder.py`.

        Args:
            folder: Must exist.
            state: Weights to write instead of those of the backbone.
        """
        adapter = checkpoint.save_weights(self.backbone, folder, state)
        self.backbone.save_processor(folder)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, folder / HEAD_FILE)
        about = RerankerFile(
            base=self.embedder.base,
            revision=self.embedder.revision,
            options=self.backbone.options(),
            attention=self.backbone.attention,
            pooling=self.backbone.pooling,
            adapter=adapter,
            trained_head=self.head_is_trained,
            head=self.head.kind,
            prompt=asdict(self.prompt),
        )
        st_folder.write_reranker(folder)
        write_json(folder / st_folder.RERANKER_FILE, about.model_dump())
        write_card(folder)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder that `Reranker.from_pretrained` loads, in one step; replaces an existing folder."""
        checkpoint.write_folder(Path(folder), self.write_files)
        return Path(folder)


def decoder(backbone: Backbone) -> DecoderBackbone:
    """Returns the backbone as one that reads pairs.

    Raises:
        UserError: for a dual encoder.
    """
    if not isinstance(backbone, DecoderBackbone):
        raise UserError(f"{backbone.name}: dual encoders cannot rerank pairs; use a vision-language model")
    return backbone
