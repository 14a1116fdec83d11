"""The command line: one function a verb, each a thin wrapper of a function of the library.

Nothing heavy is imported before a verb needs it: `vlm2vec --help` answers at once. This file is the table of verbs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import typer

from vlm2vec.cli import data, embed, models, score, search, serve, store, train, ui
from vlm2vec.errors import UserError

VERBS: dict[str, Callable[..., None]] = {
    "demo": train.demo,
    "train": train.train,
    "recipes": train.recipes,
    "eval": score.evaluate,
    "report": score.report,
    "embed": embed.embed,
    "verify": models.verify,
    "export": models.export,
    "mine": train.mine,
    "serve": serve.serve,
    "index": search.index,
    "search": search.search,
    "classify": search.classify,
    "duplicates": search.duplicates,
    "ui": ui.ui,
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "data": ("Prepare and look at data.", {"demo": data.data_demo, "check": data.data_check, "fetch": data.data_fetch}),
    "store": (
        "Look at and clean the vectors that evaluations keep.",
        {"ls": store.store_ls, "clean": store.store_clean},
    ),
}

app = typer.Typer(
    help="Turn a vision-language model into one embedding model for text and pictures: train, measure, use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
for _name, (_help, _verbs) in GROUPS.items():
    _group = typer.Typer(help=_help, no_args_is_help=True)
    for _verb_name, _verb_function in _verbs.items():
        _group.command(_verb_name)(_verb_function)
    app.add_typer(_group, name=_name)


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, its import tells of kernels for GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
