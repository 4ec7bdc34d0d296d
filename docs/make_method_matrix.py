"""Writes docs/methods.md: what each method does at each layer kind, tried out, beside what the peer does there.

    python docs/make_method_matrix.py

A letter is written where the thing was run and found right: F the output changes and disabling gives the base, bit for
bit, M merging equals the forward, U unmerging gives the very parameters back, B a mixed batch equals each adapter
alone, A two adapters are active together, C it compiles into one graph. A dash: the method refuses the layer in a
sentence.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from laws.kinds import KINDS, Chain, Kind
from laws.table import Row, rows
from laws.test_laws import base_model, config_for, near, planted

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import registry
from veneer.core.nf4_linear import Nf4Linear


def packed() -> nn.Module:
    """The linear kind's model with its layer in NF4."""
    plain = KINDS["linear"].build()
    return Chain(plain.first, Nf4Linear.of(plain.layer.weight, plain.layer.bias))


KINDS["linear_nf4"] = Kind("linear_nf4", packed, KINDS["linear"].inputs, KINDS["linear"].targets)


def changes_and_is_off(row: Row, kind: str) -> bool:
    tuner, x = planted(row, kind)
    y = tuner(x)
    with tuner.disabled():
        off = tuner(x)
    return not torch.equal(y, off) and torch.equal(off, base_model(kind)[0](x))


def merges(row: Row, kind: str) -> bool:
    tuner, x = planted(row, kind)
    y = tuner(x)
    tuner.merge()
    return near(tuner(x), y, row.tolerance)


def unmerges(row: Row, kind: str) -> bool:
    tuner, _ = planted(row, kind)
    before = [dict(h.site.module.named_parameters()) for h in tuner.hosts()]
    tuner.merge()
    tuner.unmerge()
    after = [dict(h.site.module.named_parameters()) for h in tuner.hosts()]
    return all(b[k] is a[k] for b, a in zip(before, after, strict=True) for k in b)


def mixes(row: Row, kind: str) -> bool:
    tuner, x = planted(row, kind, names=("a", "b"))
    each = []
    for name in ("a", "b"):
        tuner.set_active(name)
        each.append(tuner(x))
    tuner.route(["a", "b", "__base__", "a"])
    y = tuner(x)
    return near(y[0], each[0][0], 1e-5) and near(y[1], each[1][1], 1e-5)


def several(row: Row, kind: str) -> bool:
    tuner, x = planted(row, kind, names=("a", "b"))
    outputs = []
    for active in (("a",), ("b",), ("a", "b")):
        tuner.set_active(*active)
        outputs.append(tuner(x))
    return not torch.equal(outputs[2], outputs[0]) and not torch.equal(outputs[2], outputs[1])


def compiles(row: Row, kind: str) -> bool:
    torch._dynamo.reset()
    tuner, x = planted(row, kind)
    y = tuner(x)
    return near(torch.compile(tuner, backend="eager", fullgraph=True)(x), y, 1e-5)


CHECKS: dict[str, Callable[[Row, str], bool]] = {
    "F": changes_and_is_off, "M": merges, "U": unmerges, "B": mixes, "A": several, "C": compiles,
}  # fmt: skip


def cell(row: Row, kind: str) -> str:
    """The letters of what works; "-" where the method cannot sit."""
    try:
        planted(row, kind)
    except (ValueError, NotImplementedError):
        return "-"
    letters = ""
    for letter, check in CHECKS.items():
        try:
            letters += letter if check(row, kind) else ""
        except (ValueError, NotImplementedError, torch._dynamo.exc.TorchDynamoException):
            continue
    return letters


def first_rows() -> dict[str, Row]:
    """peft_type -> its first row in the laws' table."""
    found: dict[str, Row] = {}
    for row in rows():
        kind = sorted(row.kinds)[0]
        found.setdefault(str(config_for(row, kind).peft_type), row)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(Path(__file__).parent / "peer_matrix.csv", encoding="utf-8", newline="") as file:
        peer = {line.pop("type"): line for line in csv.DictReader(file)}
    kinds = [k for k in KINDS if k != "linear_no_bias"]
    lines = [
        "# Methods",
        "",
        "Every method, where it sits, and what was tried there. Made by `python docs/make_method_matrix.py`.",
        "",
        *["    " + line for line in (__doc__ or "").strip().split("\n")[4:]],
        "",
        "In each cell: ours, and below it in small type the peer's (PEFT 0.21.2; F, M, U, B as above).",
        "",
        "| method | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    cells = filled = theirs = 0
    for peft_type, row in sorted(first_rows().items()):
        line = [f"**{peft_type}**"]
        for kind in kinds:
            ours, other = cell(row, kind), peer.get(peft_type, {}).get(kind, "")
            cells, filled, theirs = cells + 1, filled + (ours != "-"), theirs + (other not in ("", "-"))
            line.append(ours + (f"<br><sub>{other}</sub>" if other else ""))
        print(peft_type, line[1:], flush=True)
        lines.append("| " + " | ".join(line) + " |")
    lines += ["", f"{filled} of {cells} cells are filled; the peer fills {theirs}.", "", "## Sources", ""]
    lines += [f"- `{m.peft_type}`: {m.summary}" for m in sorted(registry.METHODS.values(), key=lambda m: m.peft_type)]
    (Path(__file__).parent / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
