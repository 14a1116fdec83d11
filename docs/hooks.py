"""Pages that are generated from the code when the site is built: commands, recipe keys, source files."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "src/vlm2vec"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    pages = {"reference/cli.md": cli_page, "reference/recipe.md": recipe_page, "explain/files.md": files_page}
    for uri, make in pages.items():
        files.append(File.generated(config, uri, content=make()))
    return files


def cli_page() -> str:
    """Every command with its arguments and options, as `--help` shows them."""
    import typer

    from vlm2vec.cli import app

    command = typer.main.get_command(app)
    lines = ["# Command line", "", command.help or "", ""]
    commands = command.commands.items()  # type: ignore[attr-defined]
    for name, sub in sorted(item for item in commands if not item[1].hidden):
        nested = getattr(sub, "commands", None)
        for path, each in [(name, sub)] if nested is None else [(f"{name} {n}", c) for n, c in sorted(nested.items())]:
            lines += _command(f"vlm2vec {path}", each)
    return "\n".join(lines)


def _command(path: str, command: Any) -> list[str]:
    context = command.context_class(command, info_name=path)
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [f"## `{path}`", "", _plain(command.help or ""), "", "```text", usage, "```", ""]
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and "--help" not in record[0]:
            rows.append(f"| `{record[0].replace('|', ', ')}` | {_plain(record[1])} |")
        elif record is None and getattr(parameter, "help", None):
            rows.append(f"| `{parameter.human_readable_name}` | {_plain(parameter.help)} |")
    return [*lines, "| option | meaning |", "| --- | --- |", *rows, ""] if rows else lines


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def recipe_page() -> str:
    """Every key of a recipe with type, default and meaning, from the docstrings of its fields."""
    from vlm2vec.training.config import Recipe

    explained = _field_docstrings(PACKAGE / "training/config.py")
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a YAML file with these sections; see [Training](../guides/training.md).",
        "",
    ]
    for name, field in Recipe.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        if not kinds:
            lines += [f"## `{name}`", "", _plain(explained.get(("Recipe", name), "")), ""]
        for kind in kinds[:1]:
            lines += [
                f"## `{name}`",
                "",
                _plain(kind.__doc__ or ""),
                "",
                "| key | default | meaning |",
                "| --- | --- | --- |",
            ]
            for key, about in kind.model_fields.items():
                default = "required" if about.is_required() else f"`{about.get_default(call_default_factory=True)!r}`"
                lines.append(f"| `{name}.{key}` | {default} | {_plain(explained.get((kind.__name__, key), ''))} |")
            lines.append("")
    return "\n".join(lines)


def _field_docstrings(path: Path) -> dict[tuple[str, str], str]:
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[node.name, ast.unparse(field.target)] = textwrap.dedent(str(text.value.value))
    return found


def files_page() -> str:
    """Every module with the first line of its docstring."""
    lines = ["# Source files", "", "Each file of `src/vlm2vec` with the first line of its docstring.", ""]
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        name = folder.relative_to(PACKAGE.parent).as_posix()
        about = _summary(folder / "__init__.py")
        lines += [f"## `{name}/`", "", about, "", "| file | what it does |", "| --- | --- |"]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"| `{path.name}` | {_plain(_summary(path))} |")
        lines.append("")
    return "\n".join(lines)


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
    return (text or "").partition("\n")[0]
