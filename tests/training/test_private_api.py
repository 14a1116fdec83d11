"""A new version of transformers that closes a private door fails here, by the door's name."""

from __future__ import annotations

import inspect
import re

import pytest
import transformers

from vlm2vec.training.private_api import PRIVATE, PRIVATE_ATTRIBUTES, CheckpointingTrainer

SOURCE = inspect.getsource(transformers.Trainer)


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_the_trainer_still_has_and_calls(name: str) -> None:
    method = getattr(transformers.Trainer, name, None)
    assert method is not None, f"transformers.Trainer.{name} is gone"
    parameters = tuple(inspect.signature(method).parameters)[1:]
    assert parameters == PRIVATE[name], f"transformers.Trainer.{name} takes {parameters} now"
    assert re.search(rf"self\.{name}\(", SOURCE), f"transformers.Trainer no longer calls {name}"


@pytest.mark.parametrize("name", PRIVATE_ATTRIBUTES)
def test_the_trainer_still_reads(name: str) -> None:
    assert len(re.findall(rf"self\.{name}\b(?! =)", SOURCE)) >= 1, f"transformers.Trainer no longer reads {name}"


def test_every_overridden_private_method_is_listed() -> None:
    inherited = set(vars(transformers.Trainer))
    overridden = {
        name
        for name in vars(CheckpointingTrainer)
        if name.startswith("_") and not name.startswith("__") and name in inherited
    }
    assert overridden == set(PRIVATE)
