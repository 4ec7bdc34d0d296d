"""An adapter in the form that a server reads: vLLM, SGLang, llama.cpp, Ollama, PEFT.

Servers read plain LoRA. What is none is turned into it, which needs the base model; what cannot be is refused with the
reason, before anything is written.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from veneer.hf.convert import save_as_lora
from veneer.hf.peft_names import METHODS
from veneer.train import adapters, modelfile, models, plain_lora
from veneer.train.config import Model
from veneer.train.evaluate import Session
from veneer.train.formats import alpaca_prompt
from veneer.train.merging import PROMPTS
from veneer.train.plain_lora import PlainLora

CONSUMERS = ("vllm", "sglang", "llama.cpp", "ollama", "peft")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*", "run.yaml")


@dataclass
class Options:
    """How to export.

    Args:
        base: the base model's folder or id; default: the one the adapter names.
        rank: of the LoRA that another method is turned into, or the share of its energy to keep, in (0, 1).
        max_rank: the largest rank the server takes; a higher one is cut down.
        gguf: a GGUF of the base.
        merged: for llama.cpp and Ollama, base and adapter in one GGUF.
        kind: what the GGUF's new weights are stored as: f16, f32, bf16, or q8_0 for merged ones.
        serve_from: for Ollama, the name of the base there, if not ``gguf``.
        trust_remote_code: as in transformers.
    """

    base: str | None = None
    rank: int | float | None = None
    max_rank: int | None = None
    gguf: str | None = None
    merged: bool = False
    kind: str = "f16"
    serve_from: str | None = None
    trust_remote_code: bool = False


@dataclass
class Exported:
    """What was written, what was changed on the way, and how it is used."""

    files: list[str]
    notices: list[str] = field(default_factory=list)
    command: str = ""


def export(folder: str, out: str, consumer: str, options: Options | None = None) -> Exported:
    """Write the adapter in ``folder`` to ``out`` as ``consumer`` reads it.

    Args:
        folder: an adapter's folder.
        out: a folder, or for llama.cpp a file; it must not exist.
        consumer: one of ``CONSUMERS``.
        options: how.

    Raises:
        ValueError: ``out`` exists, or the adapter cannot be had in this form; nothing is written then.
        OSError: a file or model that is not there.
    """
    options = options or Options()
    if consumer not in CONSUMERS:
        raise ValueError(f"There is no export for '{consumer}'; choose from {', '.join(CONSUMERS)}.")
    if Path(out).exists():
        raise ValueError(f"'{out}' exists already; name one that does not.")
    _check(consumer, options)
    if consumer == "peft":
        return _peft(Path(folder), Path(out), options)
    result = Exported([])
    lora = _fit(_plain(folder, consumer, options, result.notices), options.max_rank, result.notices)
    partial = Path(out).with_name(Path(out).name + ".partial")
    try:
        if consumer == "llama.cpp":
            partial.parent.mkdir(parents=True, exist_ok=True)
            _write_gguf(partial, lora, options)
            result.command = _llama_command(out, options)
        else:
            partial.mkdir(parents=True)
            {"ollama": _ollama}.get(consumer, _server)(Path(folder), partial, lora, options, result)
            result.command = _command(consumer, out, lora, options)
        partial.rename(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    result.files = [str(p) for p in sorted(Path(out).iterdir())] if Path(out).is_dir() else [out]
    return result


def _check(consumer: str, options: Options) -> None:
    """Refuse what cannot go together, before any file is read."""
    ggufs = consumer in ("llama.cpp", "ollama")
    if ggufs and importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Exporting for {consumer} needs the package gguf: pip install 'veneer[train]'.")
    if options.merged and not ggufs:
        raise ValueError(f"For {consumer}, make a merged model with `veneer merge`.")
    if options.merged and not options.gguf:
        raise ValueError("A merged GGUF is made from a GGUF of the base: name it with --gguf.")
    if options.kind == "q8_0" and not options.merged:
        raise ValueError("A GGUF adapter is stored as f16, f32 or bf16; q8_0 is for --merged.")
    if options.kind not in ("f16", "f32", "bf16", "q8_0"):
        raise ValueError(f"GGUF weights are written as f16, f32, bf16 or q8_0, not '{options.kind}'.")
    if consumer == "ollama" and not (options.gguf or options.serve_from):
        raise ValueError("Ollama needs the base: a file with --gguf, or the name of a model it has with --from.")


# ---- plain LoRA ------------------------------------------------------------------------------------------------------
def _plain(folder: str, consumer: str, options: Options, notices: list[str]) -> PlainLora:
    """The adapter as plain LoRA, converted if that is needed and possible."""
    found = plain_lora.read(folder)
    if isinstance(found, PlainLora):
        return found
    reasons = " and ".join(found)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            notice = convert(folder, temporary, options)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{consumer} reads plain LoRA, and '{folder}' is more: {reasons}. Turning it into LoRA failed: {error} "
                f"`veneer merge {folder} --out FOLDER` makes a model without an adapter, if the method can merge."
            ) from error
        again = plain_lora.read(temporary)
    if isinstance(again, PlainLora):
        notices.append(f"{consumer} reads plain LoRA, and this adapter is more: {reasons}. {notice}")
        return again
    raise ValueError(
        f"{consumer} reads plain LoRA, and even as LoRA '{folder}' is more: {' and '.join(again)}. Serve the merged "
        f"model instead: `veneer merge {folder} --out FOLDER`."
    )


def convert(folder: str, out: str, options: Options) -> str:
    """Write the adapter in ``folder`` as LoRA to ``out``; returns how close that came, in a sentence.

    Raises:
        ValueError: the method's effect is no sum onto a weight, or the base is unknown.
        OSError: the base is not there.
    """
    stored = adapters.read_config(folder)
    own = getattr(stored, "r", None)
    rank = options.rank or (own if isinstance(own, int) and own > 0 else 16)
    settings = {"dtype": "float32", "quantize": "none", "device": "cpu"}
    session = Session(options.base, folder, settings | {"trust_remote_code": options.trust_remote_code})
    save_as_lora(out, session.model, rank)
    wanted = _log_probs(session)
    base: Any = models.load_model(session.settings)
    bare, session.model = session.model, adapters.load(base, out).eval()
    del bare
    got = _log_probs(session)
    divergence = F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean().item()
    same = (wanted.argmax(-1) == got.argmax(-1)).float().mean().item()
    asked = f"rank {rank}" if isinstance(rank, int) else f"the ranks that hold {rank:.0%} of the change"
    close = f"mean KL divergence {max(divergence, 0):.1e} nats, same likeliest token in {same:.1%}"
    return f"It was turned into LoRA of {asked}; of {len(wanted)} tokens compared: {close}." + (
        " A higher --rank comes closer." if divergence > 1e-2 else ""
    )


@torch.inference_mode()
def _log_probs(session: Session) -> torch.Tensor:
    """Next-token log-probabilities over ``PROMPTS``, (tokens, vocabulary)."""
    found = []
    for text in PROMPTS:
        if session.template == "chat":
            text = session.render([{"role": "user", "content": text}])
        ids = torch.tensor([session.tokenizer(text, add_special_tokens=False)["input_ids"]])
        found.append(
            F.log_softmax(session.model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :].float(), -1)
        )
    return torch.cat(found)


def _fit(lora: PlainLora, limit: int | None, notices: list[str]) -> PlainLora:
    """Of at most this rank, with one rank and one scale."""
    if limit is not None and lora.rank > limit:
        high = lora.rank
        lora, lost = lora.narrowed(limit)
        notices.append(f"Rank {high} was cut to {limit}, which leaves out {lost:.2%} of the change's squared norm.")
    return lora.even()


# ---- servers ---------------------------------------------------------------------------------------------------------
def _server(folder: Path, out: Path, lora: PlainLora, options: Options, result: Exported) -> None:
    """vLLM and SGLang: r, lora_alpha and a list of target_modules; one rank, one scale, no other tensors."""
    if lora.rank > VLLM_RANKS[-1]:
        result.notices.append(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this one is {lora.rank}: use --max-rank.")
    if options.base:
        lora.config["base_model_name_or_path"] = options.base
    lora.write(out)
    _copy_companions(folder, out)


def _copy_companions(folder: Path, out: Path) -> None:
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            shutil.copy(file, out / file.name)


def _command(consumer: str, out: str, lora: PlainLora, options: Options) -> str:
    """What starts the server."""
    base = shlex.quote(str(options.base or lora.config.get("base_model_name_or_path") or "BASE"))
    where, name = shlex.quote(out), shlex.quote(Path(out).name)
    if consumer == "vllm":
        limit = next((rank for rank in VLLM_RANKS if rank >= lora.rank), lora.rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {name}={where}"
    if consumer == "sglang":
        return f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={where}"
    return f"ollama create {name} -f {shlex.quote(str(Path(out) / 'Modelfile'))}"


def _peft(folder: Path, out: Path, options: Options) -> Exported:
    """A copy where PEFT has the method, else LoRA."""
    config, _ = plain_lora.load(folder)
    result = Exported([], command=f"PeftModel.from_pretrained(base, {out.name!r})")
    method = str(config.get("peft_type"))
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True)
        if method in METHODS.values():
            for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
                shutil.copy(folder / name, partial / name)
            _name_base(partial / adapters.CONFIG_FILE, options.base)
        else:
            result.notices.append(f"PEFT has no method {method}. {convert(str(folder), str(partial), options)}")
        _copy_companions(folder, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    result.files = [str(path) for path in sorted(out.iterdir())]
    return result


def _name_base(file: Path, base: str | None) -> None:
    if base:
        config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- llama.cpp and Ollama --------------------------------------------------------------------------------------------
def _write_gguf(path: Path, lora: PlainLora, options: Options) -> None:
    from veneer.train import gguf_files  # its package is optional

    if options.merged and options.gguf:
        gguf_files.write_merged(path, options.gguf, lora, options.kind)
        return
    if options.gguf:
        shape = gguf_files.shape_of_file(options.gguf)
    else:
        base = options.base or lora.config.get("base_model_name_or_path")
        if not base:
            raise ValueError("Name the base with --model or --gguf: the order of its weights' rows depends on it.")
        model = Model.model_validate({"path": str(base), "trust_remote_code": options.trust_remote_code})
        shape = gguf_files.shape_of_config(models.load_config(model))
    gguf_files.write_adapter(path, lora, shape, options.kind)


def _llama_command(out: str, options: Options) -> str:
    if options.merged:
        return f"llama-cli -m {shlex.quote(out)}"
    return f"llama-cli -m {shlex.quote(options.gguf or 'BASE.gguf')} --lora {shlex.quote(out)}"


def _ollama(folder: Path, out: Path, lora: PlainLora, options: Options, result: Exported) -> None:
    name = "model.gguf" if options.merged else "adapter.gguf"
    _write_gguf(out / name, lora, options)
    template, system, stops = _rendering(folder, result.notices)
    base = f"./{name}" if options.merged else options.serve_from or str(Path(str(options.gguf)).resolve())
    text = modelfile.write(base, None if options.merged else f"./{name}", template, system, stops)
    (out / "Modelfile").write_text(text, encoding="utf-8")


def _rendering(folder: Path, notices: list[str]) -> tuple[str | None, str | None, list[str]]:
    """(template in Go's language, system message, stops): as the adapter was trained."""
    recipe = folder / "run.yaml"
    data = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("data", {}) if recipe.is_file() else {}
    how, system = data.get("template", "auto"), data.get("system")
    if not (folder / "tokenizer_config.json").is_file():
        notices.append(
            "The adapter has no tokenizer beside it, so the Modelfile has no TEMPLATE: Ollama uses the base's."
        )
        return None, system, []
    tokenizer = models.load_tokenizer(Model.model_validate(str(folder)))
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if how == "alpaca":
        return alpaca_prompt("{{ .Prompt }}"), system, stops
    if how == "none" or not tokenizer.chat_template:
        return "{{ .Prompt }}", system, stops
    turns = modelfile.observe(tokenizer)
    if turns is None:
        notices.append(
            "The tokenizer's chat template does more than to put texts around each turn, so the Modelfile has no "
            "TEMPLATE: Ollama uses the base's."
        )
        return None, system, stops
    return turns.go(), system or turns.default, stops
