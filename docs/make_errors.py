"""The page of error sentences, collected from the code that raises them; what stands in ‹› is filled in at run time.

    python docs/make_errors.py

Only sentences that stand in a ``raise`` are found, which is nearly all of them.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "veneer"
AREAS = {
    "cli": "On the command line",
    "train": "Settings, data and training",
    "hf": "Models, files and the hub",
    "engine": "Placing, merging, combining and loading adapters",
    "core": "Settings of adapters, layers and quantised bases",
    "methods": "Methods",
    "ops": "Equations",
}
KINDS = {
    "ValueError", "TypeError", "NotImplementedError", "FileNotFoundError", "ImportError", "ConfigError", "OSError",
    "KeyError", "RuntimeError", "AttributeError", "FetchError", "FileExistsError", "PermissionError",
}  # fmt: skip


def sentence(node: ast.expr) -> str | None:
    """The text of a message, with the code of its fields in ‹›; None of one that is not written out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [
            part.value if isinstance(part, ast.Constant) else f"‹{ast.unparse(part.value)}›" for part in node.values
        ]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = sentence(node.left), sentence(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def errors(file: Path) -> list[tuple[str, str]]:
    """(kind, sentence) of each error that a file raises, in the order of the file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS and call.args:
            text = sentence(call.args[0])
            if text and " " in text:
                found.append((node.lineno, call.func.id, " ".join(text.split())))
    return [(kind, text) for _, kind, text in sorted(found)]


def page() -> str:
    """The page, by area and file."""
    lines = [
        "# Error sentences",
        "",
        "Every sentence that veneer stops with, collected from its code. Each names the thing, its value, and the way",
        "out; what stands in ‹ › is filled in. Search this page for a few words of yours;",
        "[troubleshooting](troubleshooting.md) goes by symptoms.",
        "",
    ]
    for folder, title in AREAS.items():
        lines += [f"## {title}", ""]
        for file in sorted((SOURCE / folder).glob("*.py")):
            found = errors(file)
            if found:
                lines += [f"### `{folder}/{file.name}`", ""]
                lines += [f"- <small>{kind}</small> {_plain(text)}" for kind, text in dict.fromkeys(found)]
                lines += [""]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    for sign in "\\`*_[]{}#":
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;").replace("|", "&#124;")


if __name__ == "__main__":
    print(page())
