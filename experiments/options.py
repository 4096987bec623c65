"""Options that several commands of ``servelab`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "BlockTokens", "Format", "Limit", "Modules", "Quiet", "TimeUnit"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
Modules = Annotated[
    list[Path] | None,
    typer.Option("--policy-module", metavar="FILE", help="File (or module) with own policies."),
]
Format = Annotated[str | None, typer.Option(help="Trace format; default: told by the first line.")]
BlockTokens = Annotated[
    int | None,
    typer.Option(help="Tokens per block id of the trace, where the file leaves it open."),
]
TimeUnit = Annotated[str | None, typer.Option(help="Unit of the trace's times: s, ms, us or ns.")]
Limit = Annotated[int | None, typer.Option(help="Only so many requests, from the start.")]
