"""Commands on a checkpoint: verify, export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import OptionsOption, OutputOption, PickleOption, settings_of
from vlm2vec.progress import say


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder, or the built-in compact.")],
    against: Annotated[
        str | None, typer.Option(help="Compare with another library: sentence-transformers, server or vllm.")
    ] = None,
    url: Annotated[str, typer.Option(help="URL of the server, without /v1/embeddings.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Name of the model on the server.")] = "vlm2vec",
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Recompute a checkpoint's golden vectors and compare them with the saved ones or with another library's.

    Example: vlm2vec verify runs/mine --against sentence-transformers
    """
    from vlm2vec.models.verification.verify import report_against, report_saved

    settings = settings_of(option, allow_pickle)
    lines = report_against(folder, against, url, model, settings) if against else report_saved(folder, settings)
    say("\n".join(lines))


def export(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id or a built-in model.")],
    to: Annotated[str, typer.Option(help="Format: merged, sentence-transformers, vllm, onnx or openvino.")],
    output: OutputOption,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Write a checkpoint in another format and compare its vectors with the source's.

    Example: vlm2vec export runs/mine --to sentence-transformers -o exported
    """
    from vlm2vec.models.verification.export import export as run_export
    from vlm2vec.models.verification.vllm_export import SGLANG_FILE, VLLM_FILE

    settings = settings_of(option, allow_pickle)
    done = run_export(source, to, output, **settings)
    size = sum(path.stat().st_size for path in done.files) / 1e6
    say(f"{output}: {len(done.files)} files, {size:.1f} MB")
    say(f"Lowest cosine to the source: {done.cosine:.6f} of {done.num_inputs} inputs")
    if to == "vllm":
        say(f"Next: sh {output / VLLM_FILE}, or sh {output / SGLANG_FILE}, in the folder {output.parent.resolve()}")


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that vlm2vec train or save_pretrained wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Hub id, owner/name; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request instead of committing to the main branch.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload a saved model with its model card to the Hugging Face hub, by default to a private repository.

    The token is HF_TOKEN or that of hf auth login.

    Example: vlm2vec push runs/mine me/my-embedder
    """
    from vlm2vec.models.checkpoints.push import push_folder

    url = push_folder(folder, repo_id, private=not public, pull_request=pull_request, message=message)
    say(f"{folder}: uploaded to {url}")
