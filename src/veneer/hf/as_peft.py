"""Serving under the name ``peft``: programs that import it get veneer's objects, unchanged.

One finder in ``sys.meta_path`` answers for ``peft`` and its sub-modules, and for the distribution that version checks
ask about. A sub-module here is a face: each of its names is looked up, when it is first used, in the table of where
veneer has it, so a class is the same object under both names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import runpy
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.core import errors
from veneer.core.config import PEFT_VERSION
from veneer.hf import peft_names

NAME = "peft"
LIBRARIES = ("transformers", "accelerate", "trl", "diffusers")
LATE = (
    "PeftModel", "PeftMixedModel", "PeftConfig", "LoraConfig", "get_peft_model", "get_peft_model_state_dict",
    "set_peft_model_state_dict", "prepare_model_for_kbit_training",
)  # fmt: skip
"""What modules of these libraries import from ``peft`` when they are loaded themselves."""
USAGE = "usage: python -m veneer.as_peft SCRIPT [ARGUMENTS ...] | -m MODULE [ARGUMENTS ...]"


def install_as_peft() -> types.ModuleType:
    """Answer to the name ``peft`` from now on, in this process. A second call changes nothing.

    Names in ``target_modules``, ``modules_to_save`` and ``exclude_modules`` that match nothing are then passed over
    with a warning, as programs for the peer expect, as long as others match.

    Call it early: transformers' Trainer, TRL, accelerate and diffusers look for ``peft`` when they are imported. Where
    there was none, they are made to look again; a real one that they imported cannot be replaced any more.

    Returns:
        The module that ``import peft`` gives.

    Raises:
        RuntimeError: the real ``peft`` has been imported already.
    """
    there = sys.modules.get(NAME)
    if there is not None and not isinstance(there, PeftFace):
        raise RuntimeError(
            f"The real peft is imported already (from {getattr(there, '__file__', 'somewhere')}), and two libraries "
            "cannot share one name; call veneer.install_as_peft() before anything imports peft, or run the program "
            "with `python -m veneer.as_peft SCRIPT`."
        )
    if not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())
        importlib.invalidate_caches()
        errors.lenient = True
        _catch_up()
    return importlib.import_module(NAME)


def _catch_up() -> None:
    """Have libraries that were imported before look for ``peft`` once more, and give them what they lack.

    They remember that there was none, and their modules miss the names that they would have imported.
    """
    for name, module in list(sys.modules.items()):
        asks = vars(module).get("is_peft_available") if name.partition(".")[0] in LIBRARIES else None
        if asks is None:
            continue
        if hasattr(asks, "cache_clear"):
            asks.cache_clear()
        for late in LATE:
            vars(module).setdefault(late, peft_names.find(NAME, late))


class PeftFace(types.ModuleType):
    """``peft`` or one of its sub-modules: names that are found in veneer when they are first asked for."""

    def __getattr__(self, name: str) -> Any:
        full = f"{self.__name__}.{name}"
        if name == "__all__" and self.__name__ == NAME:  # asked for by `from peft import *` alone
            return peft_names.public()
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if full in peft_names.MODULES:
            return importlib.import_module(full)
        try:
            value = peft_names.find(self.__name__, name)
        except LookupError:
            raise AttributeError(
                f"veneer, which answers for peft here, has no '{name}' in {self.__name__}; its names are those of "
                f"PEFT {PEFT_VERSION} that other libraries use."
            ) from None
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *(peft_names.public() if self.__name__ == NAME else ())})


class PeftFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the faces, and the record of an installed distribution called ``peft``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        if fullname not in peft_names.MODULES:
            raise ModuleNotFoundError(
                f"veneer, which answers for peft here, has no module '{fullname}': nothing of PEFT {PEFT_VERSION} that "
                "other libraries use lives there.",
                name=fullname,
            )
        return importlib.machinery.ModuleSpec(fullname, self, origin="veneer", is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return PeftFace(spec.name, f"veneer, under the name {spec.name}.")

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == NAME:
            module.__version__ = PEFT_VERSION  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name in (None, NAME):
            yield PeftRecord()


class PeftRecord(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of ``peft``: the release whose names and behaviour are served."""

    _TEXTS = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {PEFT_VERSION}\nSummary: veneer, as peft\n",
        "top_level.txt": f"{NAME}\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._TEXTS.get(str(filename))

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def main(arguments: Iterable[str] | None = None) -> None:
    """Run an unmodified program with ``peft`` being veneer: a script, or with ``-m`` a module, and its arguments.

    Raises:
        SystemExit: there is nothing to run.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest == ["-m"] or rest[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if rest[:1] in (["-h"], ["--help"]) else 2)
    install_as_peft()
    if rest[0] == "-m":
        sys.argv = rest[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(rest[0]):
        raise SystemExit(f"There is no script '{rest[0]}' to run.")
    sys.argv = rest
    sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
    runpy.run_path(rest[0], run_name="__main__")
