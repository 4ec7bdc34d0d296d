"""The API page: every public name, where it lives, for mkdocstrings to fill in.

    python docs/make_api.py

Names are listed by what they are for; what a group leaves out stands under "Other".
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import veneer

GROUPS = {
    "Models with adapters": ["veneer.hf.tasks", "veneer.hf.auto", "veneer.hf.inject"],
    "Settings": ["veneer.core.config", "veneer.core.registry", "veneer.methods.lora_options"],
    "Files and weights": [
        "veneer.hf.state_dict", "veneer.hf.base_state", "veneer.hf.adapterhub", "veneer.hf.convert",
        "veneer.hf.status",
    ],
    "Starts": [
        "veneer.hf.initialize", "veneer.hf.eva", "veneer.hf.preprocess", "veneer.hf.prefix_start", "veneer.hf.kappa",
    ],
    "Quantised bases": ["veneer.core.nf4_linear", "veneer.hf.quantised_start", "veneer.hf.peer"],
    "Several adapters": ["veneer.hf.mixtures", "veneer.hf.pool"],
    "Optimisers": ["veneer.train.optim"],
}  # fmt: skip

IN_PARTS = ("PeftModel",)
"""Classes whose members are written in several files."""


def page() -> str:
    """Markdown with a directive for each public name."""
    lines = [
        "# API",
        "",
        "Every name is imported from `veneer`. The methods' config classes are on [their pages](methods/index.md).",
        "",
    ]
    listed = {home for homes in GROUPS.values() for home in homes}
    rest = [home for home in veneer._HOMES if home not in listed]
    for title, homes in {**GROUPS, "Other": rest}.items():
        lines += [f"## {title}", ""]
        for home in homes:
            for name in veneer._HOMES.get(home, ()):
                value = getattr(veneer, name)
                options = ["    options:", "      inherited_members: true"] if name in IN_PARTS else []
                lines += [f"::: {value.__module__}.{value.__qualname__}", *options, ""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page())
