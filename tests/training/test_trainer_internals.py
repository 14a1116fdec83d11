"""Internal names of transformers and PEFT that training uses: a failing test names what a new version has changed."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import transformers

import vlm2vec.training
from vlm2vec.training.trainer_internals import PEFT_METHODS, PRIVATE, PRIVATE_ATTRIBUTES, CheckpointingTrainer

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


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_pefts_dora_layer_still_has_and_calls(name: str) -> None:
    from peft.tuners.lora import dora

    method = getattr(dora.DoraLinearLayer, name, None)
    assert method is not None, f"peft.tuners.lora.dora.DoraLinearLayer.{name} is gone"
    parameters = set(inspect.signature(method).parameters) - {"self"}
    assert parameters == PEFT_METHODS[name], f"DoraLinearLayer.{name} takes {parameters} now"
    assert re.search(rf"self\.{name}\(", inspect.getsource(dora.DoraLinearLayer)), f"PEFT no longer calls {name}"


def test_arguments_have_a_number_of_gpus_that_can_be_set() -> None:
    assert "self._n_gpu" in inspect.getsource(transformers.TrainingArguments), "TrainingArguments._n_gpu is gone"


def test_no_other_module_of_training_imports_internals() -> None:
    """Documented are `transformers`, `peft` and `transformers.integrations`; further submodules are not."""
    found = []
    for path in Path(vlm2vec.training.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            is_internal = module.startswith(("transformers.", "peft.")) and module != "transformers.integrations"
            if is_internal and path.name != "trainer_internals.py":
                found.append(f"{path.name}: {module}")
    assert found == []
