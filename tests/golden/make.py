"""Make the golden folders: what the peer writes, and what its models answer. By hand, with the peer installed:

    python -m pip install peft==0.21.2 scikit-learn
    PYTHONHASHSEED=0 python tests/golden/make.py [CASE ...]

Each folder holds `adapter_config.json` and `adapter_model.safetensors` as written, and `io.safetensors`: inputs, the
output with the adapter (`output`), with further adapters (`output.NAME`) and after merging (`merged`, where the peer
merges and agrees with itself). Its metadata name the base model of `bases.py`. Where the peer is known to be wrong, the
case says so and gives the right answer.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from golden.bases import BASES, WEIGHTS, build, stored
from golden.cases import CASES, Case

FOLDERS = Path(__file__).parent / "folders"
TOLERANCE = 1e-4


def randomise(parameters: list[nn.Parameter], seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def write_bases(names: set[str]) -> None:
    WEIGHTS.mkdir(exist_ok=True)
    for seed, name in enumerate(BASES):
        path = WEIGHTS / f"{name}.safetensors"
        if name not in names or path.exists():
            continue
        if name == "llama_resized":  # the plain model's rows, and zeros where the new ones will be
            weights = stored(build("llama"))
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                weights[key] = torch.cat([weights[key], torch.zeros(8, weights[key].shape[1])])
        else:
            model = BASES[name]()
            randomise(list(model.parameters()), 100 + seed, 0.25)
            weights = stored(model)
        save_file(weights, path)


def inputs_of(base: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"mlp": (3, 16), "stack": (3, 12), "conv1d_hf": (3, 8), "conv1d": (2, 4, 7), "conv2d": (2, 3, 6, 6)}
    shapes |= {"conv3d": (2, 2, 3, 4, 4), "mha": (2, 5, 8), "experts": (3, 8), "experts_turned": (3, 8)}
    shapes |= {"parameter": (3, 8)}
    if base in shapes:
        return {"x": torch.randn(shapes[base], generator=generator)}
    ids = torch.randint(3, 20, (2, 6), generator=generator)
    if base == "embedding":
        return {"x": ids}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    decoder = {"decoder_input_ids": ids[:, :4].clone()} if base == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = dict(inputs)
    x = inputs.pop("x", None)
    # The peer's outermost model keeps task ids from the router of a plain base.
    model = model.base_model if "task_ids" in inputs and x is not None else model
    with torch.no_grad():
        y = model(x, **inputs) if x is not None else model(**inputs)
    return (y.logits if hasattr(y, "logits") else y).contiguous()


def make(case: Case) -> str:
    torch.manual_seed(0)
    folder, inputs = FOLDERS / case.name, inputs_of(case.base) | case.inputs()
    shutil.rmtree(folder, ignore_errors=True)
    base = build(case.base)
    plain = answer(base, {k: v for k, v in inputs.items() if k != "task_ids"})
    model = peft.get_peft_model(base, case.config(peft))
    randomise([p for p in model.parameters() if p.requires_grad], case.seed, case.size)
    if case.then is not None:
        case.then(model, inputs)
    model.eval()
    io = {**inputs, "output": answer(model, inputs)}
    if case.second is not None:
        model.add_adapter("other", case.second(peft))
        model.set_adapter("other")
        randomise([p for p in model.parameters() if p.requires_grad], case.seed + 1, case.size)
        io["output.other"] = answer(model.eval(), inputs)
        model.set_adapter("default")
    model.save_pretrained(folder, **case.save)
    for readme in folder.rglob("README.md"):
        readme.unlink()
    notes = _merge(case, model, inputs, io)
    again = peft.PeftModel.from_pretrained(build(case.base), folder)
    gap = (answer(again.eval(), inputs) - io["output"]).abs().max().item()
    if gap > TOLERANCE:
        notes += f" PEER-RELOAD-GAP {gap:.1e}"
    if (io["output"][:, -plain.shape[1] :] - plain).abs().max() < 1e-3:  # prompts come before the text
        notes += " THE ADAPTER DOES NOTHING"
    if case.right is not None:
        case.right(base := build(case.base), load_file(folder / "adapter_model.safetensors"))
        io["output"], io["merged"] = answer(base, inputs), answer(base, inputs)
        notes += " answered by a base with the right weights instead"
    save_file(io, folder / "io.safetensors", metadata={"base": case.base})
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return f"{case.name:24} {size:6} bytes{notes}"


def _merge(case: Case, model: nn.Module, inputs: dict[str, torch.Tensor], io: dict[str, torch.Tensor]) -> str:
    if not case.merges:
        return ""
    try:
        merged = answer(model.merge_and_unload(), inputs)
    except Exception as error:  # the peer cannot merge this method; the note shows up in the run's output
        return f" no merge: {type(error).__name__} {str(error)[:60]}"
    gap = (merged - io["output"]).abs().max().item()
    if gap > TOLERANCE:
        return f" PEER-MERGE-GAP {gap:.1e}"
    io["merged"] = merged
    return ""


def main() -> None:
    warnings.simplefilter("ignore")
    chosen = [case for case in CASES if len(sys.argv) < 2 or case.name in sys.argv[1:]]
    write_bases({"llama", *(case.base for case in chosen)})
    for case in chosen:
        try:
            print(make(case), flush=True)
        except Exception as error:
            shutil.rmtree(FOLDERS / case.name, ignore_errors=True)
            print(f"{case.name:24} FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
