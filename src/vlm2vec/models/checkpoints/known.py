"""Looks up published embedding models and the settings that their own files lack (`known_checkpoints.yaml`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from vlm2vec.errors import UserError, did_you_mean, shown
from vlm2vec.models.prompts import PromptTemplate

OWN_TEMPLATE = "folder"
TABLE = Path(__file__).with_name("known_checkpoints.yaml")


class KnownCheckpoint(BaseModel):
    """One row of the table.

    Attributes:
        ids: Hub ids.
        bases: For each id, the model that it was trained from, if the planner has its configuration; otherwise empty.
        license: Licence of the weights; None if unknown.
        family: `model_type` of the model.
        template: Name of a template; None: the package's default; `OWN_TEMPLATE`: the folder's chat template.
        instruction_turn: Where a chat template gets the instruction, see `PromptTemplate`.
        pooling: Name of the pooling; None: the model's own pooling.
        options: Settings of the family.
        prompts: Instructions of `encode_query` and `encode_document`.
        evaluation: Switches of a benchmark's rows with which the authors evaluate the model, see `quirks` of a
            benchmark.
        source: Source of the facts.
        unsettled: Facts that the source does not contain.
        not_loaded: Reason why this package does not support the model.
    """

    model_config = ConfigDict(extra="forbid")

    ids: list[str]
    bases: list[str] = []
    license: str | None = None
    family: str
    template: str | None = None
    pooling: str | None = None
    options: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    instruction_turn: str = "system"
    evaluation: dict[str, Any] = {}
    source: str
    unsettled: str | None = None
    not_loaded: str | None = None


class Table(BaseModel):
    """Content of the file."""

    model_config = ConfigDict(extra="forbid")

    templates: dict[str, str]
    checkpoints: list[KnownCheckpoint]


@cache
def table() -> Table:
    """Returns the table that ships with the package."""
    return Table.model_validate(yaml.safe_load(TABLE.read_text()))


def find(hub_id: str) -> KnownCheckpoint | None:
    """Returns the row of a hub id; None if it is not in the table.

    Raises:
        UserError: for a model that this package does not support.
    """
    for row in table().checkpoints:
        if hub_id.lower() in (known.lower() for known in row.ids):
            if row.not_loaded:
                raise UserError(f"{hub_id}: {row.not_loaded}")
            return row
    return None


def find_named(hub_id: str) -> KnownCheckpoint:
    """Like `find`, but the id must be in the table.

    Raises:
        UserError: if it is not; the message lists the known ids.
    """
    row = find(hub_id)
    if row is None:
        ids = sorted(name for row in table().checkpoints for name in row.ids if not row.not_loaded)
        raise UserError(
            f"{shown(hub_id)} is not a known checkpoint{did_you_mean(hub_id, ids) or '.'} Known: {', '.join(ids)}"
        )
    return row


def template_of(row: KnownCheckpoint, own: str = "") -> PromptTemplate | None:
    """The row's prompt template; None where the default is right.

    Args:
        row: Of the table.
        own: The chat template of the model's folder.

    Raises:
        UserError: if the row needs the folder's chat template and there is none.
    """
    if row.template is None:
        return None
    chat = own if row.template == OWN_TEMPLATE else table().templates[row.template]
    if not chat:
        raise UserError(f"{row.ids[0]}: its prompts are written by the chat template of its folder, which has none")
    return PromptTemplate(chat=chat, instruction_turn=row.instruction_turn)


def evaluation_of(model: str, like: str | None = None) -> dict[str, Any]:
    """The switches with which a known model is evaluated by its authors; {} for any other model.

    Args:
        model: Hub id, or anything else that names a model.
        like: Hub id of the known model of which `model` is a copy.
    """
    row = find_named(like) if like else find(model)
    return dict(row.evaluation) if row else {}
