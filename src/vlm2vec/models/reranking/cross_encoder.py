"""Reads the folder of a generating CrossEncoder: a chat template with turns for query and document, and two answers.

Every key of its files is either applied or rejected by name, as in `st_reading.py`; sentence-transformers itself is not
imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm2vec.errors import UserError, shown
from vlm2vec.files import read_json
from vlm2vec.models import loading
from vlm2vec.models.checkpoints.tensors import read_model
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.loading import LoadSettings
from vlm2vec.models.prompts import with_variables
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.st_folder import CONFIG_FILE, MODULES_FILE, TRANSFORMER_FILE

PACKAGE = "sentence_transformers."
MODULES = ["Transformer", "LogitScore"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ModelFile(_Strict):
    """`config_sentence_transformers.json`; the activation changes no order, and scores here are log-odds."""

    versions: dict[str, Any] = Field({}, alias="__version__")
    model_type: Literal["CrossEncoder"]
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    activation_fn: str | None = None


class _Processing(_Strict):
    chat_template: dict[str, Any] = {}


class _TransformerFile(_Strict):
    """`sentence_bert_config.json`."""

    transformer_task: Literal["any-to-any", "text-generation"]
    modality_config: dict[str, Any]
    module_output_name: Literal["causal_logits"]
    processing_kwargs: _Processing = _Processing()
    unpad_inputs: bool | None = None


class _LogitScoreFile(_Strict):
    """`config.json` of `LogitScore`."""

    true_token_id: int
    false_token_id: int
    module_input_name: Literal["causal_logits"] = "causal_logits"


def is_cross_encoder(folder: Path) -> bool:
    """Returns whether a folder was written by sentence-transformers' CrossEncoder with modules."""
    about = read_json(folder / CONFIG_FILE)
    return isinstance(about, dict) and about.get("model_type") == "CrossEncoder"


def load_cross_encoder(folder: Path, settings: LoadSettings, prompt: RerankPrompt | None = None) -> PairModel:
    """Loads a CrossEncoder whose modules are `Transformer` and `LogitScore`.

    Args:
        folder: The folder.
        settings: As for an embedding model.
        prompt: Wording of the prompt. Default: chat template, answers and default prompt of the folder.

    Raises:
        UserError: naming the file and the module, key or value that is not supported.
    """
    score = folder / _score_folder(folder) / "config.json"
    answers = read_model(score, _LogitScoreFile)
    about = read_model(folder / TRANSFORMER_FILE, _TransformerFile)
    whole = read_model(folder / CONFIG_FILE, _ModelFile)
    loaded = loading.load_adapter_or_base(str(folder), settings)
    backbone = loaded.backbone
    chat = backbone.chat_template()
    if not chat:
        raise UserError(f"{folder}: has no chat template; expected one with the roles query and document")
    if prompt is None:
        words = [backbone.tokenizer.decode([token]) for token in (answers.true_token_id, answers.false_token_id)]
        prompt = RerankPrompt(
            instruction=whole.prompts.get(whole.default_prompt_name or "", ""),
            answers=(words[0], words[1]),
            chat=with_variables(chat, about.processing_kwargs.chat_template),
        )
    return PairModel.of(Embedder(backbone, loaded.base, loaded.revision).to(settings.device), prompt).eval()


def _score_folder(folder: Path) -> str:
    """Returns the folder of the `LogitScore`, after checking that the modules are supported."""
    rows = read_json(folder / MODULES_FILE)
    kinds = [str(row.get("type", "")) for row in rows] if isinstance(rows, list) else []
    if [kind.rpartition(".")[2] for kind in kinds] != MODULES or not all(kind.startswith(PACKAGE) for kind in kinds):
        found = ", ".join(map(shown, kinds)) or "no modules"
        raise UserError(f"{folder / MODULES_FILE}: {found}: expected sentence-transformers' own {', '.join(MODULES)}")
    return str(rows[1].get("path", ""))
