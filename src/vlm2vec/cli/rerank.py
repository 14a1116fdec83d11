"""Command that orders inputs by how well they answer a query, with a model that reads both together."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm2vec.cli.options import OptionsOption, PickleOption, settings_of
from vlm2vec.errors import UserError
from vlm2vec.progress import progress_bar, say

MOST = 10_000


def rerank(
    model: Annotated[str, typer.Argument(help="A VLM that generates text: folder or hub id.")],
    source: Annotated[str, typer.Argument(help="Candidates: a folder or file as for embed.")],
    text: Annotated[str | None, typer.Option("--query", help="Text of the query.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image of the query; may be combined with a text.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What makes a candidate relevant.")] = None,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Number of results.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Order images, texts or pages by a model that reads each together with the query.

    Example: vlm2vec rerank Qwen/Qwen3-VL-2B-Instruct photos/ --query "a dog on the beach"
    """
    from vlm2vec.jobs.searching import Query
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.media.images import ImageRef
    from vlm2vec.models.reranking.reranker import Reranker

    query = Query(text, ImageRef(path=str(image)) if image else None, instruction).as_input()
    records = list(islice(open_source(source), MOST + 1))
    if len(records) > MOST:
        raise UserError(f"{source}: more than {MOST:,} candidates; select the nearest with vlm2vec search --rerank")
    good = [(record.key, record.item) for record in records if record.item is not None]
    errors = [record.error or record.key for record in records if record.item is None]
    settings: dict[str, Any] = settings_of(option, allow_pickle)
    reranker = Reranker.from_pretrained(model, **settings)
    failed: dict[int, UserError] = {}
    with progress_bar(f"reranking {source}", len(good)) as advance:
        ranked = reranker.rank(query, [item for _, item in good], on_error=failed.__setitem__, progress=advance)
    errors += [f"{good[index][0]}: {error}" for index, error in failed.items()]
    found = [(one.score, good[one.index][0]) for one in ranked if one.index not in failed][:top]
    if as_json:
        rows = [{"key": key, "score": round(score, 6)} for score, key in found]
        say(json.dumps({"results": rows, "errors": errors}, indent=2))
        return
    for score, key in found:
        say(f"{score:.3f} {key}")
    for error in errors:
        say(f"left out: {error}")
