"""``veneer merge``, ``veneer inspect`` and ``veneer methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


def merge(
    adapter: Folder,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write; it must not exist.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base; default: the one the adapter names.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What is saved; auto: what the base is stored in.")] = "auto",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line, to compare on.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0.0, help="Mean KL divergence allowed; default by dtype.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Fold an adapter into its base, and prove that the saved model answers the same before saying done."""
    texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()] if prompts else None
    from veneer.train import merging, models

    models.quiet()
    certificate = merging.merge(
        adapter,
        out,
        model=model,
        dtype=dtype,
        prompts=texts,
        tolerance=tolerance,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    print(f"Merged into {out} ({certificate.dtype}). {certificate}.")


def inspect(
    folder: Folder,
    every: Annotated[bool, typer.Option("--all", help="Every layer, not only the ends of a long list.")] = False,
    json: Json = False,
    spectrum: Annotated[
        bool,
        typer.Option("--spectrum", help="Singular values by layer: a table, spectrum.png, and ranks to train with."),
    ] = False,
    energy: Annotated[float, typer.Option(help="Share of a delta's squares that a suggested rank keeps.")] = 0.95,
) -> None:
    """What an adapter is: method, settings, size, norm and effective rank by layer, the base it wants."""
    if spectrum:
        from veneer.cli.tables import show_spectrum
        from veneer.hf import spectrum as spectra

        layers = spectra.of_folder(folder)
        show_spectrum(spectra.rows(layers, energy), spectra.suggested_ranks(layers, energy))
        picture = Path(folder) / "spectrum.png"
        spectra.draw(layers, picture, energy)
        print(picture)
        return
    from veneer.train import inspection

    found = inspection.inspect(folder)
    if json:
        import dataclasses
        import json as writer

        print(writer.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
        return
    from veneer.cli.tables import show_inspection

    show_inspection(found, every)


def methods(json: Json = False) -> None:
    """Every method there is: its name for `adapter: {method: ...}`, and where it comes from."""
    from veneer.train.catalogue import methods as catalogue

    rows = catalogue()
    if json:
        import json as writer

        print(writer.dumps([vars(row) for row in rows], indent=2, ensure_ascii=False))
        return
    from veneer.cli.tables import show_methods

    show_methods(rows)
