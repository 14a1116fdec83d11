"""Texts that are longer than the model reads: refused, or cut where the request asks for it.

Some models cut a long text themselves and without a warning. Whether one did is found from its tensors alone: the end
of a text was not read if the tensors stay the same without it. This holds for every model family.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.serving.refusals import Refusal
from vlm2vec.types import EmbeddingInput

Side = Literal["left", "right"]
PROBE_WORDS = 16_384  # more than any model here reads that cuts texts itself
MODEL_LIMIT = -1


@dataclass(frozen=True)
class Truncation:
    """The truncation that a request asks for.

    Attributes:
        tokens: Maximum number of tokens of an input, image tokens and template included; `MODEL_LIMIT` (-1): what the
            model reads; None: refuse longer inputs.
        side: The side from which text is removed.
    """

    tokens: int | None = None
    side: Side = "right"


REFUSE = Truncation()


@dataclass(frozen=True)
class Prepared:
    """An input as tensors.

    Attributes:
        batch: Tensors of this input alone.
        num_tokens: Tokens that the model reads.
        dropped: Text tokens that were cut.
    """

    batch: Batch
    num_tokens: int
    dropped: int = 0


class TextLimits:
    """Makes the tensors of an input and keeps them within the limits of model and server.

    Args:
        backbone: The model.
        max_tokens: Limit of the server on the tokens of one input.
    """

    def __init__(self, backbone: Backbone, max_tokens: int) -> None:
        self.backbone, self.max_tokens = backbone, max_tokens
        self.model_limit = self._model_limit()

    def prepare(self, item: EmbeddingInput, truncation: Truncation = REFUSE) -> Prepared:
        """Make the tensors of one input.

        Raises:
            Refusal: 400 if the text is longer than the model reads, 413 if the input is longer than the server allows,
                and the request does not ask to cut it; 400 if it cannot be cut enough.
            UserError: if the input cannot be processed.
        """
        prepared = self._process(item)
        spans = read = None
        if self.model_limit is not None and prepared.num_tokens >= self.model_limit:
            spans = self._spans(item)
            read = self._tokens_read(item, spans)
        is_cut = spans is not None and read is not None and read < len(spans)
        if truncation.tokens is None:
            if is_cut and spans is not None:
                raise _too_long(read or 0, len(spans))
            if prepared.num_tokens > self.max_tokens:
                message = f"the input has {prepared.num_tokens} tokens; at most {self.max_tokens} are allowed"
                raise Refusal(413, "too_many_tokens", message)
            return prepared
        limit = self.max_tokens if truncation.tokens == MODEL_LIMIT else min(truncation.tokens, self.max_tokens)
        if prepared.num_tokens <= limit and not is_cut:
            return prepared
        spans = self._spans(item) if spans is None else spans
        kept = len(spans) if read is None else read
        if prepared.num_tokens <= limit and truncation.side == "right":
            return replace(prepared, dropped=len(spans) - kept)  # as the model cuts it itself
        return self._cut(item, spans, kept, limit, truncation.side)

    def _cut(self, item: EmbeddingInput, spans: list[tuple[int, int]], kept: int, limit: int, side: Side) -> Prepared:
        """Remove text tokens until the input has at most `limit` tokens."""
        for _ in range(8):  # tokens next to a cut may merge or split, so the first count can be off by a few
            if kept < 1:
                break
            shorter = _without_end(item, spans, kept) if side == "right" else _without_begin(item, spans, kept)
            prepared = self._process(shorter)
            if prepared.num_tokens <= limit:
                return replace(prepared, dropped=len(spans) - kept)
            kept -= prepared.num_tokens - limit
        raise Refusal(
            400, "bad_truncation", f"the input has more than {limit} tokens even without its text; raise the limit"
        )

    def _process(self, item: EmbeddingInput) -> Prepared:
        with torch.inference_mode():
            batch = self.backbone.process_each([item])[0]  # does not count or log truncated texts, as process does
        return Prepared(batch, self.backbone.costs(batch)[0])

    def _tokens_read(self, item: EmbeddingInput, spans: list[tuple[int, int]]) -> int:
        """How many tokens of the text the model reads, counted from the start."""
        if "<|image_" not in _text(item) and _text(item):
            item = replace(item, images=(), video=None)  # decoding them again would say nothing about the text
        whole = self._ids(item)

        def same(kept: int) -> bool:
            return bool(kept) and torch.equal(self._ids(_without_end(item, spans, kept)), whole)

        if not spans or not same(len(spans) - 1):
            return len(spans)
        return bisect.bisect_left(range(min(len(spans), whole.shape[-1] + 1)), True, key=same)

    def _ids(self, item: EmbeddingInput) -> torch.Tensor:
        return self._process(item).batch["input_ids"]

    def _spans(self, item: EmbeddingInput) -> list[tuple[int, int]]:
        """Begin and end of each token in the text; of each word if the tokenizer does not report them."""
        text, tokenizer = _text(item), self.backbone.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return [match.span() for match in re.finditer(r"\S+", text)]
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(begin, end) for begin, end in encoded["offset_mapping"] if end > begin]

    def _model_limit(self) -> int | None:
        """Tokens of the longest text that the model reads, if it cuts longer ones itself; None if it does not."""
        try:
            long, longer = (self._process(EmbeddingInput(text="a " * n)) for n in (PROBE_WORDS, 2 * PROBE_WORDS))
        except UserError:  # the model refuses long texts
            return None
        return long.num_tokens if long.num_tokens == longer.num_tokens else None


def _too_long(read: int, count: int) -> Refusal:
    """In the words of OpenAI and vLLM, which clients search for."""
    message = f"This model's maximum context length is {read} tokens, but the text has {count} tokens. "
    return Refusal(
        400, "context_length_exceeded", message + "Shorten the text, or set truncate_prompt_tokens to -1 to cut it."
    )


def _text(item: EmbeddingInput) -> str:
    return item.text or item.instruction or ""


def _with_text(item: EmbeddingInput, text: str) -> EmbeddingInput:
    return replace(item, text=text) if item.text else replace(item, instruction=text)


def _without_end(item: EmbeddingInput, spans: list[tuple[int, int]], kept: int) -> EmbeddingInput:
    return _with_text(item, _text(item)[: spans[kept - 1][1]])


def _without_begin(item: EmbeddingInput, spans: list[tuple[int, int]], kept: int) -> EmbeddingInput:
    return _with_text(item, _text(item)[spans[-kept][0] :])
