"""`Reranker`: uses any vision-language model that generates text as a second retrieval stage that scores pairs.

    reranker = Reranker.from_pretrained("Qwen/Qwen3-VL-2B-Instruct")
    for found in reranker.rank("a red square", [Path("red.png"), Path("blue.png")]):
        print(found.index, found.score)

A score is the difference of two logits, "yes" minus "no", of the language-model head after a prompt with query and
candidate (Qwen3-VL-Reranker; FreeRet, arXiv 2509.24621). No training is needed.

Shapes: N candidates, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.encoding.settings import EncodeSettings, EncodingModel
from vlm2vec.models.reranking.loading import load_pair_model
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prefix import SharedPrefix
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.scores import check_cosines, check_weight, probability, with_cosine
from vlm2vec.models.verification.fingerprint import describe
from vlm2vec.models.vision.feature_memory import FeatureMemory
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.types import EmbeddingInput, require_many


@dataclass(frozen=True)
class Ranked:
    """A candidate after reranking.

    Attributes:
        index: Position of the candidate in the input.
        score: Probability of the positive answer, 0 to 1; with a cosine weight, the sum of `log_odds` and weighted
            cosine. Candidates are ordered by it. NaN if the candidate could not be read.
        log_odds: Logit of the positive answer minus that of the negative one.
    """

    index: int
    score: float
    log_odds: float


class Reranker:
    """Scores candidates with a model that reads query and candidate together.

    Args:
        model: The model with its head and prompt.

    Attributes:
        prompt: Wording of the prompt.
        backbone: The network and its processor.
        has_chat: Whether the model has a chat template.
        scorer: The model; it gives the log-odds of a batch of pairs.
        image_features: Features of images that were read before. None: the family cannot give them apart, or the
            backbone's own cache keeps them.
    """

    def __init__(self, model: PairModel) -> None:
        self.scorer = model.eval()
        self.prompt, self.backbone, self.has_chat = model.prompt, model.backbone, model.has_chat
        network = model.backbone.model
        self.image_features = FeatureMemory(network) if FrozenVision.possible(network) else None

    @classmethod
    def from_pretrained(cls, source: str, *, prompt: RerankPrompt | None = None, **options: Any) -> Reranker:
        """Loads a trained reranker, or a model that generates text.

        Args:
            source: A folder that `vlm2vec train` wrote with `task: rerank`; a folder or hub id of a generating
                CrossEncoder of sentence-transformers; or of a model that generates text.
            prompt: Wording of the prompt. Default: that of the trained reranker, otherwise of Qwen3-VL-Reranker.
            options: Options of `Embedder.from_pretrained`, such as `device`, `dtype`, `revision`.

        Raises:
            UserError: if the source cannot be loaded, is a dual encoder, or has no language-model head.
        """
        return cls(load_pair_model(source, prompt, **options))

    def describe(self, model: str) -> dict[str, str]:
        """Describes everything that scores depend on besides query and candidate, as for an embedder's vectors.

        Args:
            model: The user's name of the model.
        """
        words = json.dumps(asdict(self.prompt), sort_keys=True)
        head = b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in self.scorer.head.parameters())
        return {
            **describe(self.scorer.embedder, model),
            "model": f"{model} as a reranker",  # the model as an embedder has vectors of its own
            "rerank_prompt": hashlib.sha256(words.encode()).hexdigest()[:16],
            "head": hashlib.sha256(head).hexdigest()[:16],
        }

    def pair(self, query: EmbeddingInput, candidate: EmbeddingInput) -> EmbeddingInput:
        """Combines query and candidate to the input that `scorer` reads.

        Raises:
            UserError: if both have a video.
        """
        return self.scorer.pair(query, candidate)

    def score(
        self,
        query: Any,
        candidates: Sequence[Any],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        on_error: Callable[[int, UserError], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Returns the log-odds of each candidate in input order, float32, shape [N].

        Args:
            query: An input as for `Embedder.encode`.
            candidates: Inputs as for `Embedder.encode`. Equal candidates are scored once.
            instruction: Definition of relevance. Default: the instruction of the query, or that of the prompt.
            batch_tokens: Maximum number of tokens in a forward pass. Default: as in `Embedder.encode`.
            on_error: Called with position and reason for each unreadable candidate, whose score is NaN. Default: raise
                at the first one.
            progress: Called with the number of pairs completed since the last call.

        Raises:
            UserError: for a query or, without `on_error`, a candidate that cannot be read.
        """
        require_many(candidates, "candidates")
        asked = EmbeddingInput.of(query, instruction)
        pairs = {}
        for index, candidate in enumerate(candidates):
            try:
                pairs[index] = self.pair(asked, EmbeddingInput.of(candidate))
            except UserError as error:
                if on_error is None:
                    raise
                on_error(index, error)
        places = list(pairs)
        report = None if on_error is None else lambda position, error: on_error(places[position], error)
        settings = EncodeSettings(batch_tokens=batch_tokens, on_error=report, progress=progress)
        scores_N = np.full(len(candidates), np.nan, dtype=np.float32)
        scorer: EncodingModel = SharedPrefix(self.scorer, asked) if len(pairs) > 1 else self.scorer
        for part in Pipeline(scorer, settings).stream(pairs.values()):
            for row, values in enumerate(part.vectors):
                if row not in part.bad:
                    scores_N[places[part.begin + row]] = values[0]
        return scores_N

    def rank(
        self,
        query: Any,
        candidates: Sequence[Any],
        top: int | None = None,
        *,
        instruction: str | None = None,
        cosines: Sequence[float] | np.ndarray | None = None,
        cosine_weight: float = 0.0,
        on_error: Callable[[int, UserError], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ranked]:
        """Returns the candidates by descending score; ties keep their order, unreadable candidates come last.

        Args:
            query: See `score`.
            candidates: See `score`.
            top: Number of candidates returned. Default: all.
            instruction: See `score`.
            cosines: An embedder's cosine of the query with each candidate; needed with `cosine_weight`.
            cosine_weight: The cosine times this number is added to the log-odds (`with_cosine`). 0: the reranker alone
                decides.
            on_error: See `score`.
            progress: See `score`.

        Raises:
            UserError: as `score`, and for a weight without cosines, or another number of cosines than candidates.
        """
        require_many(candidates, "candidates")
        near_N = check_cosines(cosines, len(candidates)) if check_weight(cosine_weight) else None
        log_odds_N = self.score(query, candidates, instruction=instruction, on_error=on_error, progress=progress)
        sums_N = with_cosine(log_odds_N, near_N, cosine_weight)
        scores_N = sums_N if cosine_weight else probability(log_odds_N)
        order = np.argsort(-np.nan_to_num(sums_N, nan=-np.inf), kind="stable")[:top]
        return [Ranked(int(i), float(scores_N[i]), float(log_odds_N[i])) for i in order]
