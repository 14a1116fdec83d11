"""The command line: a thin function for each command, which calls the library.

`COMMANDS` and `GROUPS` are the table of commands. A command imports what it needs when it runs, so that
`vlm2vec --help` answers at once.
"""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from vlm2vec import __version__
from vlm2vec.cli import (
    cache,
    data,
    embed,
    index,
    look,
    machine,
    mcp,
    models,
    plan,
    rerank,
    score,
    search,
    serve,
    train,
    ui,
)
from vlm2vec.cli.failures import Interrupted, explain

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train": {
        "demo": train.demo,
        "train": train.train,
        "plan": plan.plan,
        "recipes": train.recipes,
        "mine": train.mine,
        "merge": train.merge,
    },
    "Evaluate": {"eval": score.evaluate, "report": score.report},
    "Embed and search": {
        "embed": embed.embed,
        "index": index.index,
        "load": index.load,
        "forget": index.forget,
        "relocate": index.relocate,
        "search": search.search,
        "rerank": rerank.rerank,
        "classify": search.classify,
        "duplicates": search.duplicates,
        "map": look.map_store,
        "explain": look.explain,
    },
    "Serve": {"serve": serve.serve, "ui": ui.ui, "mcp": mcp.mcp},
    "Models and this machine": {"models": machine.models, "doctor": machine.doctor},
    "Checkpoints": {"verify": models.verify, "export": models.export, "push": models.push},
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "data": (
        "Prepare, check, show and download benchmark data; copy sample photographs.",
        {
            "sample": data.data_sample,
            "demo": data.data_demo,
            "check": data.data_check,
            "show": data.data_show,
            "fetch": data.data_fetch,
        },
    ),
    "cache": ("List and delete cached embeddings.", {"ls": cache.cache_ls, "clean": cache.cache_clean}),
    "setup": ("Install optional parts.", {"compact": machine.setup_compact}),
    "store": ("Deprecated: use vlm2vec cache.", {"ls": cache.store_ls, "clean": cache.store_clean}),
}
DEPRECATED = ("store",)
DEBUG = "--debug"

app = typer.Typer(
    help="Turn a vision-language model into an embedding model for text and images: train, evaluate, serve.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"vlm2vec {__version__}\n")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Print the traceback behind an error; accepted anywhere on the command line.")
    ] = False,
) -> None:
    """Turn a vision-language model into an embedding model for text and images: train, evaluate, serve."""


for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
for _name, (_help, _commands) in GROUPS.items():
    _group = typer.Typer(help=_help)
    for _command_name, _command in _commands.items():
        _group.command(_command_name)(_command)
    app.add_typer(_group, name=_name, hidden=_name in DEPRECATED, rich_help_panel="Data, caches, parts")


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; an exception becomes one line on standard error.

    Args:
        arguments: Without the program's name; `--debug` among them prints tracebacks.
    """
    words = [word for word in arguments if word != DEBUG] or ["--help"]
    try:
        code = app(words, prog_name="vlm2vec", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Exception as error:  # noqa: BLE001 the boundary between the program and the terminal
        if DEBUG in arguments:
            traceback.print_exc()
        line, exit_code = explain(error)
        if isinstance(error, Interrupted):
            line += f". To continue: {shlex.join(['vlm2vec', *arguments])}"
        sys.stderr.write(f"error: {line}\n")
        return exit_code


def main() -> None:
    """Entry point of the `vlm2vec` program."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.simplefilter("ignore", FutureWarning)  # between libraries; a user cannot act on them
    sys.exit(run(sys.argv[1:]))
