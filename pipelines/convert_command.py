"""``draftline convert``: a draft checkpoint in another project's layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DialectName(StrEnum):
    """Layouts that can be written."""

    DEEPSPEC = "deepspec"
    SPECULATORS = "speculators"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the draft checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    dialect: Annotated[DialectName, typer.Option("--to", help="Layout of DST.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The draft's target, a directory or hub id: named in DST, asked for facts."),
    ] = None,
    with_frozen: Annotated[
        bool, typer.Option("--with-frozen", help="Write the target's embeddings and LM head into DST too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already in DST.")] = False,
) -> None:
    """Rewrite a draft checkpoint in another project's layout."""
    from draftline.draft.convert import Conversion, convert_checkpoint

    done = convert_checkpoint(Conversion(source, destination, dialect.value, target, with_frozen, force))
    config = done.model.config
    vocabulary = f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens" if config.is_pruned else "whole"
    typer.echo(f"Read {source}: {done.found}, {config.algorithm}, vocabulary {vocabulary}")
    typer.echo(f"Wrote {destination}: {dialect.value}")
    confidence = "no confidence head" if done.difference.confidence is None else str(done.difference.confidence)
    typer.echo(
        f"Compared on random inputs: weights equal bit by bit; greatest difference of logits "
        f"{done.difference.logits}, of confidence logits {confidence}"
    )
    for warning in done.warnings:
        typer.echo(f"warning: {warning}.", err=True)
