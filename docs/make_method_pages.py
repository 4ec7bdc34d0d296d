"""A page for every method, made from its file: source, equation, settings, where it sits, an example, the code.

    python docs/make_method_pages.py FOLDER

The site makes them anew at each build (docs/hooks.py), so none is committed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import veneer
import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import registry
from veneer.core.config import LayerConfig, PeftConfig

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIANTS = ("dora", "alora", "arrow", "bdlora", "kasa", "monteclora", "qalora", "velora")
STARTS = {"lora_init": "pissa, milora, olora, mica, orthogonal, loftq", "lora_calibrate": "eva, corda, lora_ga"}

# What the shortest example needs beside its method's defaults.
NEEDS = {
    "ADALORA": "total_step=1000",
    "ADAPTION_PROMPT": "adapter_len=10, adapter_layers=2",
    "C3A": "block_size=64",
    "MULTITASK_PROMPT_TUNING": "num_virtual_tokens=20, num_tasks=2",
    "CPT": "num_virtual_tokens=3, cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]",
    "POLY": "n_tasks=2",
    "TRAINABLE_TOKENS": "token_indices=[5, 6, 7]",
    "VBLORA": "vector_length=64",
    "FUSION": 'adapters=["first", "second"]',
    "MOLE": 'adapters={"first": "first", "second": "second"}',
    "XLORA": 'adapters={"first": "first", "second": "second"}',
}
OF_TRAINED = {"FUSION": "BottleneckConfig", "MOLE": "LoraConfig", "XLORA": "LoraConfig"}
WITH_BIASES = """from torch import nn
from veneer import BitFitConfig, get_peft_model

base = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 2))
model = get_peft_model(base, BitFitConfig(target_modules=["0", "2"]))
model.print_trainable_parameters()"""
KINDS = {
    "linear": "linear", "conv1d_hf": "transformers' `Conv1D`", "conv1d": "1-d convolution", "conv2d": "2-d convolution",
    "conv2d_odd": "convolution of odd geometry", "conv2d_1x1": "1x1 convolution",
    "conv2d_grouped": "grouped convolution", "conv3d": "3-d convolution", "embedding": "embedding",
    "mha": "`MultiheadAttention`", "experts": "fused experts",
    "parameter": "bare parameter", "block": "whole block", "linear_nf4": "linear packed in NF4",
}  # fmt: skip
LETTERS = {"F": "runs", "M": "merges", "U": "unmerges", "B": "mixed batch", "A": "several active", "C": "compiles"}


def summary(module: ModuleType) -> tuple[str, str]:
    """The paper's sentence at the head of a module's docstring, and what follows it: equation, shapes, cost."""
    head, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    return " ".join(head.split()), rest


def meanings(cls: type) -> dict[str, str]:
    """field -> what it means, from the ``Attributes:`` of the config class and its bases."""
    return {name: said for one in reversed(cls.__mro__) for name, said in meanings_of(one).items()}


def meanings_of(cls: type) -> dict[str, str]:
    """What one class's own docstring says under ``Attributes:``."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    block = re.search(r"^Attributes:\n((?:    .*\n?|\n)+)", text, re.M)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block[1], re.M) if block else []
    return {name: " ".join(said.split()).replace("``", "`") for name, said in entries}


def fields_table(cls: type, skip: tuple[type, ...] = ()) -> list[str]:
    """The settings of a config class as Markdown, without those of ``skip``."""
    inherited = {f.name for base in skip for f in dataclasses.fields(base)}
    said = meanings(cls)
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(cls):
        if f.name not in inherited:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            default = getattr(default, "value", default)
            lines.append(f"| `{f.name}` | `{default!r}` | {said.get(f.name, '').replace('|', chr(92) + '|')} |")
    return lines if len(lines) > 2 else []


def matrix() -> dict[str, dict[str, str]]:
    """method -> layer kind -> the letters of docs/methods.md."""
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    kinds = rows[0][1:]
    return {r[0].strip("*"): dict(zip(kinds, (c.split("<br>")[0] for c in r[1:]))) for r in rows[1:] if "**" in r[0]}


def places(name: str, row: Any) -> list[str]:
    """Where the method sits and what it can do there."""
    cells = matrix().get({"BONE": "MISS"}.get(name, name), {})
    if row.config.is_prompt_learning:
        return [
            "It is read before the text, so it sits at the model and not at a layer, cannot be merged, and any "
            "precision or quantisation of the base serves it. Rows of a mixed batch may each have their own."
        ]
    if not cells:
        return ["It belongs to whole models, not to a kind of layer, so [the matrix](../methods.md) leaves it out."]
    lines = ["| layer | " + " | ".join(LETTERS.values()) + " |", "|---" * (len(LETTERS) + 1) + "|"]
    for kind, letters in cells.items():
        if letters != "-":
            lines.append(f"| {KINDS[kind]} | " + " | ".join("yes" if c in letters else "" for c in LETTERS) + " |")
    refused = [KINDS[kind] for kind, letters in cells.items() if letters == "-"]
    said = "Tried at each layer kind; [the whole matrix](../methods.md)."
    said += f" Refused, in a sentence: {', '.join(refused)}." if refused else ""
    return [said, "", *lines]


def example(name: str, row: Any) -> str:
    """Python that plants the method into a small language model."""
    if name == "BITFIT":  # small Llamas have no biases
        return WITH_BIASES
    config, wanted = row.config.__name__, NEEDS.get(name, "")
    arguments = [wanted] if wanted else []
    if row.config.is_prompt_learning and "num_virtual_tokens" not in wanted:
        arguments.append("num_virtual_tokens=20")
    if name in veneer_everywhere() and name not in OF_TRAINED:
        arguments.insert(0, 'target_modules="all-linear"')
    arguments.append('task_type="CAUSAL_LM"')
    imports = sorted({config, OF_TRAINED.get(name, config)})
    lines = [
        "from transformers import AutoModelForCausalLM",
        f"from veneer import {', '.join(imports)}, get_peft_model",
        "",
        f'base = "{BASE}"',
    ]
    if name in OF_TRAINED:
        targets = 'target_modules=["q_proj", "v_proj"], ' if OF_TRAINED[name] == "LoraConfig" else ""
        lines += [
            'for name in ("first", "second"):  # trained before, each on its own task',
            f'    config = {OF_TRAINED[name]}({targets}task_type="CAUSAL_LM")',
            "    one = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)",
            "    one.save_pretrained(name)",
        ]
    lines += [
        f"config = {config}({', '.join(arguments)})",
        "model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)",
        "model.print_trainable_parameters()",
    ]
    return "\n".join(lines)


def veneer_everywhere() -> set[str]:
    """The methods that do best on all linear layers."""
    from veneer.train.adapters import EVERYWHERE

    return EVERYWHERE


def code(module: ModuleType) -> list[str]:
    """The file itself, folded."""
    text = inspect.getsource(module)
    path = Path(module.__file__ or "").relative_to(ROOT)
    count = len(text.splitlines())
    return [f'??? abstract "{path}: the whole method, {count} lines"', "    ```python", *_indent(text), "    ```"]


def _indent(text: str) -> list[str]:
    return ["    " + line if line else "" for line in text.rstrip().splitlines()]


def _prose(text: str) -> str:
    """A docstring's body as Markdown: indented equations become code, ``names`` too."""
    parts = re.split(r"((?:^(?: {4}.*)\n?)+)", text.replace("``", "`"), flags=re.M)
    done = [
        "```text\n" + inspect.cleandoc("\n" + part) + "\n```" if part.startswith("    ") else part.strip()
        for part in parts
    ]
    return "\n\n".join(part for part in done if part)


def page(name: str) -> str:
    """One method's page."""
    row = registry.METHODS[name]
    module = sys.modules[row.build.__module__]
    paper, rest = summary(module)
    lines = [f"# {name.lower()}", "", _linked(paper), "", _prose(rest), ""]
    if name != "SHADOW":
        lines += ["## Example", "", "```python", example(name, row), "```", "", "On the command line:", ""]
        settings = {"C3A": " --adapter.block_size 64", "VBLORA": " --adapter.vector_length 64"}.get(name, "")
        settings = " --adapter.num_virtual_tokens 20" if row.config.is_prompt_learning else settings
        said = f"veneer train --model MODEL --data rows.jsonl --adapter.method {name.lower()}{settings} --out out"
        lines += [f"    {said}", ""]
    lines += ["## Settings", "", f"`veneer.{row.config.__name__}`; in a run's file, keys of the `adapter` block.", ""]
    common = LayerConfig if issubclass(row.config, LayerConfig) else PeftConfig
    lines += fields_table(row.config, (common,)) or ["None of its own."]
    shared = "\n".join(fields_table(common))
    lines += ["", '??? note "Settings that every method has"', *_indent(shared), ""]
    lines += ["## Where it sits", "", *places(name, row), "", "## Code", "", *code(module), ""]
    return "\n".join(lines)


def variant_page(stem: str) -> str:
    """The page of one of LoRA's variants or starts."""
    module = importlib.import_module(f"veneer.methods.{stem}")
    paper, rest = summary(module)
    title = STARTS.get(stem, stem)
    lines = [f"# lora: {title}", "", _linked(paper), "", _prose(rest), ""]
    if stem in STARTS:
        lines += [f"A start of [LoRA](lora.md): `init_lora_weights` {STARTS[stem]}.", ""]
    else:
        lines += ["A variant of [LoRA](lora.md), chosen by a setting of `LoraConfig`.", ""]
    return "\n".join([*lines, "## Code", "", *code(module), ""])


def _linked(paper: str) -> str:
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"doi:(\S+[^\s.)])", r"[doi:\1](https://doi.org/\1)", paper)


def index() -> str:
    """The list of all pages."""
    lines = ["# All methods", "", "Each page is made from the method's own file.", ""]
    lines += ["| method | source |", "|---|---|"]
    for name, row in sorted(registry.METHODS.items()):
        paper, _ = summary(sys.modules[row.build.__module__])
        lines.append(f"| [{name.lower()}]({name.lower()}.md) | {_linked(paper)} |")
    lines += ["", "Variants and starts of LoRA:", "", "| | source |", "|---|---|"]
    for stem in (*VARIANTS, *STARTS):
        paper, _ = summary(importlib.import_module(f"veneer.methods.{stem}"))
        lines.append(f"| [{STARTS.get(stem, stem)}]({page_name(stem)}) | {_linked(paper)} |")
    return "\n".join(lines) + "\n"


def page_name(stem: str) -> str:
    """Where a variant's page stands; a start's file may have a method's name."""
    return f"lora-{stem.removeprefix('lora_')}.md"


def pages() -> dict[str, str]:
    """path under docs/ -> Markdown."""
    made = {"methods/index.md": index()}
    made |= {f"methods/{name.lower()}.md": page(name) for name in sorted(registry.METHODS)}
    return made | {f"methods/{page_name(stem)}": variant_page(stem) for stem in (*VARIANTS, *STARTS)}


if __name__ == "__main__":
    for path, text in pages().items():
        file = Path(sys.argv[1]) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
