"""Runs the fenced blocks of a Markdown page, in order, in one folder, and looks for the output that the page claims.

    ```python        runs; the blocks of one page share their names
    ```bash          runs line by line; `veneer ...` and `python ...` in this process
    ```yaml title="run.yaml"     (any language with a title) becomes that file
    ```text          after a block that ran: every line of it is in what was printed, any number standing for any other
    ```py, ```sh, and all else   is shown only

``...`` in a claimed line stands for anything, and as a line of its own for nothing in particular.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
NUMBER = re.compile(r"\d[\d,]*(?:\\?\.\d+)?(?:e\\?-?\d+)?")


@dataclass
class Block:
    """One fenced block of a page."""

    language: str
    title: str | None
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, without the indentation of the list they may stand in."""
    found = []
    for match in FENCE.finditer(text):
        indent, language, rest, code = match.groups()
        title = re.search(r'title="([^"]+)"', rest)
        lines = [line.removeprefix(indent) for line in code.split("\n")]
        found.append(Block(language, title and title[1], "\n".join(lines), text[: match.start()].count("\n") + 2))
    return found


def run_page(page: Path, folder: Path) -> int:
    """Run a page in ``folder``; returns how many blocks ran.

    Raises:
        AssertionError: a block failed, or did not print what the page says; names page and line.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    printed, count = None, 0
    with contextlib.chdir(folder):
        for block in blocks(page.read_text(encoding="utf-8")):
            where = f"{page.name}:{block.line}"
            if block.title:
                file = folder / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.code, encoding="utf-8")
            elif block.language in ("python", "bash"):
                printed, count = _run(block, names, where), count + 1
            elif block.language == "text" and printed is not None:
                _claims(block.code, printed, where)
    return count


def _run(block: Block, names: dict[str, object], where: str) -> str:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if block.language == "python":
                exec(compile(block.code, where, "exec"), names)
            else:
                for line in block.code.replace("\\\n", " ").splitlines():
                    _shell(line, out)
    except (Exception, SystemExit) as error:
        said = f"{where} does not run: {type(error).__name__}: {error}\n{out.getvalue()[-2000:]}"
        raise AssertionError(said) from error
    return out.getvalue()


def _shell(line: str, out: io.StringIO) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "veneer":
        from veneer.cli.main import main

        _ends_well(lambda: main(words[1:]))
    elif words[0] == "python" and words[1].endswith(".py"):
        before = sys.argv
        sys.argv = words[1:]
        try:
            _ends_well(lambda: runpy.run_path(words[1], run_name="__main__"))
        finally:
            sys.argv = before
    else:
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        out.write(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(done.returncode)


def _ends_well(call) -> None:
    try:
        call()
    except SystemExit as end:
        if end.code:
            raise


def _claims(text: str, printed: str, where: str) -> None:
    seen = " ".join(printed.split())
    for line in text.splitlines():
        words = " ".join(line.split())
        if words.replace(".", ""):
            pattern = NUMBER.sub(r"[\\d.,e+-]+", re.escape(words).replace(r"\.\.\.", ".*?"))
            shown = f"{where}: the page shows {words!r}, which was not printed:\n{printed[-3000:]}"
            assert re.search(pattern, seen), shown


def world(folder: Path, base: Path, extra: dict[str, Path]) -> None:
    """What a reader of the pages has: the model under the name the pages call it by, and the repository's examples.

    The model is a tiny one, found before any hub since a folder of its name lies here.
    """
    shutil.copytree(base, folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    for name, path in extra.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
