"""Facts that a caller of ``peft`` sees. Run by ``test_against_peft_surface`` twice: on the real one, and on veneer.

python tests/hf/surface_probes.py real|veneer OUT.json     writes {probe: {fact: value}}

A probe is a function that returns facts; it imports from ``peft`` alone and asks for nothing that draws of random
numbers decide.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import os
import pickle
import re
import sys
import tempfile
import warnings

if __name__ == "__main__" and sys.argv[1] == "veneer":
    import veneer

    veneer.install_as_peft()

import peft
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TaskType,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_layer_status,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)  # fmt: skip
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

PROBES = {}


def probe(function):
    PROBES[function.__name__] = function
    return function


# ---- models and what is asked of them -------------------------------------------------------------------------------
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.lin = nn.Embedding(100, 5), nn.Conv1d(5, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.lin(self.conv(self.emb(x).mT).mean(-1))


X = torch.arange(90).view(9, 10).float()
IDS = torch.tensor([[1, 2, 3, 4], [3, 4, 5, 6]])


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_key_value_heads=2, pad_token_id=0, **sizes, **options)
    ).eval()


def mlp(config=None, **options):
    torch.manual_seed(0)
    return get_peft_model(MLP(), config or lora(), **options).eval()


def lora(**options):
    return LoraConfig(**({"target_modules": ["lin0"], "init_lora_weights": False} | options))


T = {"target_modules": ["lin0"]}
METHODS = {
    "lora": lora,
    "dora": lambda **k: LoraConfig(use_dora=True, **T, **k),
    "adalora": lambda **k: AdaLoraConfig(total_step=1, init_lora_weights=False, **T, **k),
    "ia3": lambda **k: IA3Config(feedforward_modules=[], init_ia3_weights=False, **T, **k),
    "loha": lambda **k: LoHaConfig(init_weights=False, **T, **k),
    "lokr": lambda **k: LoKrConfig(init_weights=False, **T, **k),
    "oft": lambda **k: OFTConfig(r=2, oft_block_size=0, init_weights=False, **T, **k),
    "boft": lambda **k: BOFTConfig(boft_block_size=2, init_weights=False, **T, **k),
    "hra": lambda **k: HRAConfig(init_weights=False, **T, **k),
    "vera": lambda **k: VeraConfig(init_weights=False, **T, **k),
    "randlora": lambda **k: RandLoraConfig(init_weights=False, r=2, **T, **k),
    "fourierft": lambda **k: FourierFTConfig(n_frequency=10, **T, **k),
    "waveft": lambda **k: WaveFTConfig(n_frequency=10, **T, **k),
    "vblora": lambda **k: VBLoRAConfig(vector_length=1, num_vectors=2, **T, **k),
    "c3a": lambda **k: C3AConfig(block_size=2, **T, **k),
    "miss": lambda **k: MissConfig(r=2, init_weights=False, **T, **k),
    "shira": lambda **k: ShiraConfig(r=1, init_weights=False, **T, **k),
    "road": lambda **k: RoadConfig(group_size=2, **T, **k),
    "ln_tuning": lambda **k: LNTuningConfig(**T, **k),
}


def each(facts):
    """``facts(make)`` for every method."""
    found = {}
    for name, make in METHODS.items():
        value = facts(make)
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def names(model, trainable=None):
    return sorted(n for n, p in model.named_parameters() if trainable is None or p.requires_grad is trainable)


def shapes(tensors):
    return sorted([k, list(v.shape), str(v.dtype)] for k, v in tensors.items())


def fails(call, words):
    """How a call fails: the built-in exceptions it can be caught by, and whether the sentence has the words."""
    try:
        call()
    except Exception as error:
        bases = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
        return {"raises": bases, "says": bool(re.search(words, str(error))), "sentence": str(error)[:200]}
    return {"raises": [], "says": False, "sentence": "nothing was raised"}


def warns(call, words):
    """Whether a call warns with these words."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return any(re.search(words, str(w.message)) for w in seen)


# ---- names ----------------------------------------------------------------------------------------------------------
@probe
def trainable_names():
    return each(lambda make: names(mlp(make(modules_to_save=["lin1"])), True))


@probe
def frozen_names():
    return each(lambda make: names(mlp(make(modules_to_save=["lin1"])), False))


@probe
def module_names():
    model = mlp(lora(modules_to_save=["lin1"], use_dora=True))
    wanted = [n for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())]
    same = all(p is model.get_parameter(n) for n, p in model.named_parameters())
    return {"names": sorted(wanted), "get_parameter": same}


@probe
def state_dict_names():
    model = mlp(lora(modules_to_save=["lin1"]))
    other = mlp(lora(modules_to_save=["lin1"]))
    keys = other.load_state_dict(model.state_dict())
    return {"keys": sorted(model.state_dict()), "loads": [keys.missing_keys, keys.unexpected_keys]}


@probe
def file_keys():
    return each(lambda make: shapes(get_peft_model_state_dict(mlp(make(modules_to_save=["lin1"])))))


@probe
def prompt_names():
    found = {}
    for name, make in (
        ("prompt", PromptTuningConfig),
        ("prefix", PrefixTuningConfig),
        ("p_tuning", PromptEncoderConfig),
    ):
        config = make(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(llama(), config)
        found |= {
            f"{name}.trainable": names(model, True),
            f"{name}.encoder": type(model.prompt_encoder["default"]).__name__,
            f"{name}.file": shapes(get_peft_model_state_dict(model)),
            f"{name}.tokens": list(model.prompt_tokens["default"].shape),
            f"{name}.sizes": [config.num_layers, config.token_dim, config.num_attention_heads],
            f"{name}.counts": model.get_nb_trainable_parameters(),
        }
    return found


# ---- what a model and its layers say --------------------------------------------------------------------------------
@probe
def counts():
    def printed(make):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            mlp(make()).print_trainable_parameters()
        return out.getvalue()

    return each(printed)


@probe
def layers_are():
    def facts(make):
        model = mlp(make(modules_to_save=["lin1"]))
        tuner = model.base_model
        layer, head = tuner.model.lin0, tuner.model.lin1
        kinds = (BaseTunerLayer, LoraLayer, ModulesToSaveWrapper)
        return {
            "layer": [isinstance(layer, k) for k in kinds],
            "head": [isinstance(head, k) for k in kinds],
            "model": [isinstance(model, PeftModel), isinstance(model, PeftMixedModel), type(model).__name__],
            "tuner": [
                isinstance(model.base_model, BaseTuner),
                type(model.base_model).__name__,
                model.base_model.prefix,
            ],
            "targets": [list(model.base_model.targeted_module_names), list(model.base_model.targeted_parameter_names)],
            "type": model.peft_type.value,
        }

    return each(facts)


@probe
def layers_say():
    def facts(make):
        layer = mlp(make()).base_model.model.lin0
        said = [layer.active_adapters, layer.merged, layer.merged_adapters, layer.disable_adapters]
        return [*said, layer.in_features, layer.out_features, type(layer.get_base_layer()).__name__]

    return each(facts)


@probe
def lora_layers_say():
    model = get_peft_model(Kinds(), LoraConfig(target_modules=["emb", "conv", "lin"], r=4, lora_alpha=6))
    found = {}
    for name in ("emb", "conv", "lin"):
        layer = getattr(model.base_model.model, name)
        found |= {
            f"{name}.places": [sorted(layer.lora_A), sorted(layer.lora_B), sorted(layer.lora_embedding_A)],
            f"{name}.numbers": [dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling)],
            f"{name}.options": [dict(layer.use_dora), dict(layer.lora_bias), dict(layer.use_rslora)],
            f"{name}.delta": list(layer.get_delta_weight("default").shape),
        }
    return found


@probe
def copies_say():
    head = mlp(lora(modules_to_save=["lin1"])).base_model.model.lin1
    return {
        "names": list(head.modules_to_save),
        "classes": [type(head.modules_to_save["default"]).__name__, type(head.original_module).__name__],
        "weight": head.modules_to_save["default"].weight is head.modules_to_save.default.weight,
        "state": [head.active_adapters, head.disable_adapters, head.in_features],
    }


@probe
def tokens_say():
    beside = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    alone = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]))
    table, own = beside.base_model.model.model.embed_tokens, alone.base_model.model.model.embed_tokens
    return {
        "beside": [names(beside, True), dict(table.token_adapter.token_indices)],
        "alone": [names(alone, True), dict(own.token_indices)],
        "file": shapes(get_peft_model_state_dict(beside)),
        "delta": list(own.trainable_tokens_delta["default"].shape),
    }


@probe
def status():
    model = mlp()
    model.add_adapter("other", LoraConfig(target_modules=["lin1"]))
    facts = {"model": repr(model.get_model_status())}
    return facts | {f"layer {i}": repr(s) for i, s in enumerate(model.get_layer_status())}


@probe
def strength():
    layer = mlp(LoraConfig(target_modules=["lin0"], r=4, lora_alpha=8)).base_model.model.lin0
    found = [dict(layer.scaling)]
    for change in (
        lambda: layer.set_scale("default", 3),
        lambda: layer.scale_layer(2),
        lambda: layer.unscale_layer(2),
        lambda: layer.unscale_layer(None),
        lambda: layer.set_scale("nobody", 2),
    ):
        change()
        found.append(dict(layer.scaling))
    return {"after each": found}


@probe
def dtypes():
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        for wide in (True, False):
            model = get_peft_model(MLP().to(dtype), lora(modules_to_save=["lin1"]), autocast_adapter_dtype=wide)
            kinds = {n.split(".")[3]: str(p.dtype) for n, p in model.named_parameters() if p.requires_grad}
            found[f"{dtype} {wide}"] = kinds
    empty = mlp(low_cpu_mem_usage=True)
    return found | {"meta": sorted(n for n, p in empty.named_parameters() if p.device.type == "meta")}


# ---- choosing, deleting, merging ------------------------------------------------------------------------------------
@probe
def what_trains():
    model = mlp()
    model.add_adapter("b", lora())
    found = [names(model, True)]
    for change in (
        lambda: model.set_adapter("b"),
        lambda: model.set_adapter("default", inference_mode=True),
        lambda: model.set_requires_grad("default"),
        lambda: model.set_requires_grad(["default", "b"], requires_grad=False),
        lambda: model.base_model.set_adapter(["default", "b"]),
    ):
        change()
        found.append(names(model, True))
    return {"after each": found, "active": model.active_adapters}


@probe
def adding_and_deleting():
    model = mlp()
    model.add_adapter("b", lora())
    found = {"added": [model.active_adapter, list(model.peft_config)]}
    model.set_adapter("b")
    found["warns"] = warns(lambda: model.delete_adapter("b"), "b was active which is now deleted.*default")
    found["deleted"] = [model.active_adapters, list(model.peft_config), names(model, True)]
    return found


@probe
def merging():
    def facts(make):
        model = mlp(make())
        with torch.no_grad():
            y = model(X)
            model.merge_adapter()
            merged = torch.allclose(model(X), y, atol=1e-3)
            model.unmerge_adapter()
            back = torch.allclose(model(X), y, atol=1e-3)
            plain = model.merge_and_unload()
        return [merged, back, type(plain.lin0).__name__, sorted(plain.state_dict())]

    return each(facts)


@probe
def merging_says():
    model = mlp()
    model.merge_adapter()
    layer = model.base_model.model.lin0
    return {
        "merged": [layer.merged, list(layer.merged_adapters)],
        "merge again": warns(model.merge_adapter, "already merged"),
        "unmerge": warns(model.unmerge_adapter, "nmerged"),
        "unmerge again": warns(model.unmerge_adapter, "Already unmerged"),
    }


@probe
def unloading():
    return each(lambda make: [type(m).__name__ for m in mlp(make(modules_to_save=["lin1"])).unload().modules()])


@probe
def switching_off():
    model = mlp(lora(modules_to_save=["lin1"]))
    with model.disable_adapter():
        off = [model.base_model.model.lin0.disable_adapters, [s.enabled for s in model.get_layer_status()]]
    return {"within": off, "after": [s.enabled for s in model.get_layer_status()]}


@probe
def mixing():
    model = get_peft_model(MLP(), lora(), mixed=True)
    model.add_adapter("h", LoHaConfig(target_modules=["lin0"], init_weights=False))
    found = {"class": type(model).__name__, "first": model.active_adapter}
    model.set_adapter(["default", "h"])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    found["prompt"] = fails(lambda: model.add_adapter("p", prompt), "not compatible with the `PeftMixedModel`")
    found["missing"] = fails(lambda: model.set_adapter("zz"), "zz.*not found")
    return found | {"both": [model.active_adapters, len(names(model, True))]}


@probe
def combining():
    found = {}
    for kind in ("svd", "cat", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"):
        model = mlp(lora(r=4))
        model.add_adapter("b", lora(r=2))
        model.add_weighted_adapter(["default", "b"], [0.5, 0.7], "c", combination_type=kind, density=0.5)
        layer, config = model.base_model.model.lin0, model.peft_config["c"]
        found[kind] = [list(layer.lora_A["c"].weight.shape), config.r, config.lora_alpha, float(layer.scaling["c"])]
    wrong = {"combination_type": "foo"}
    call = lambda: model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "d", **wrong)  # noqa: E731
    return found | {"unknown": fails(call, "Invalid combination_type")}


def write(path, values):
    with open(path, "w") as file:
        json.dump(values, file)


# ---- files ----------------------------------------------------------------------------------------------------------
@probe
def combining_factors():
    model = mlp(METHODS["ia3"]())
    model.add_adapter("b", METHODS["ia3"]())
    model.add_weighted_adapter(["default", "b"], [0.5, 0.25], "c")
    own = model.base_model.model.lin0.ia3_l
    return {"sum": torch.allclose(own["c"], 0.5 * own["default"] + 0.25 * own["b"]), "names": list(model.peft_config)}


@probe
def shared_tensors():
    model = mlp(METHODS["vera"]())
    layer = model.base_model.model.lin0
    one = layer.vera_A["default"].data_ptr() == model.base_model.vera_A["default"].data_ptr()
    return {"one": one, "shape": list(layer.vera_A["default"].shape)}


@probe
def targets_in_words():
    from peft.tuners.tuners_utils import check_target_module_exists

    found = {}
    for words in (["q"], ["attn.q"], r".*\.q", "q"):
        for layers, pattern in ((None, None), ([1], None), ([1], "h"), (1, ["h", "layers"]), ([], None)):
            if isinstance(words, str) and layers is not None:
                continue
            config = LoraConfig(target_modules=words, layers_to_transform=layers, layers_pattern=pattern)
            for path in ("q", "h.1.q", "x.h.1.attn.q", "layers.0.h.1.attn.q", "x.layers.1.h.2.q", "x.h.1.qq"):
                found[f"{words} {layers} {pattern} {path}"] = bool(check_target_module_exists(config, path))
    return found


@probe
def folders():
    folder = tempfile.mkdtemp()
    model = mlp()
    model.add_adapter("b", lora())
    model.save_pretrained(folder)
    found = {"files": sorted(os.path.relpath(os.path.join(a, f), folder) for a, _, fs in os.walk(folder) for f in fs)}
    for train in (False, True):
        again = PeftModel.from_pretrained(MLP(), folder, is_trainable=train)
        found[f"loaded {train}"] = [names(again, True), again.training, again.peft_config["default"].inference_mode]
    report = again.load_adapter(folder + "/b", "b")
    found["second"] = [report.unexpected_keys, names(again, True), again.active_adapters]
    again.load_adapter(folder, "c", is_trainable=True)
    found["third"] = [names(again, True), again.active_adapters]
    below = PeftModel.from_pretrained(MLP(), folder, subfolder="b", adapter_name="z")
    return found | {"subfolder": [below.active_adapters, list(below.peft_config)]}


@probe
def loading():
    model = mlp()
    tensors = get_peft_model_state_dict(model)
    short = {k: v[:, :1] for k, v in tensors.items()}
    more = tensors | {"base_model.model.foo.lora_A.weight": torch.zeros(1)}
    return {
        "fits": list(set_peft_model_state_dict(model, tensors).unexpected_keys),
        "unexpected": list(set_peft_model_state_dict(model, more).unexpected_keys),
        "shape": fails(lambda: set_peft_model_state_dict(model, short), "size mismatch"),
        "shape ignored": list(set_peft_model_state_dict(model, short, ignore_mismatched_sizes=True).unexpected_keys),
    }


@probe
def configs():
    folder = tempfile.mkdtemp()
    LoraConfig(r=3, target_modules=["a", "b"], task_type="CAUSAL_LM").save_pretrained(folder)
    path = os.path.join(folder, "adapter_config.json")
    again = PeftConfig.from_pretrained(folder)
    with open(path) as file:
        raw = json.load(file)
    found = {
        "read": [type(again).__name__, again.peft_type.value, again.task_type, again.r, sorted(again.target_modules)],
        "inference_mode": again.inference_mode,
        "sorted": list(raw) == sorted(raw),
        "minimum": sorted({"r", "peft_type", "task_type", "lora_alpha", "target_modules", "peft_version"} & set(raw)),
        "from_peft_type": type(LoraConfig.from_peft_type(peft_type="LORA", r=2)).__name__,
        "get_peft_config": type(get_peft_config({"peft_type": "LORA", "r": 2})).__name__,
        "equal": LoraConfig(r=2) == LoraConfig(r=2),
        "signature": list(inspect.signature(PeftConfig).parameters),
    }
    write(path, raw | {"foobar": 1})
    found["unknown"] = warns(lambda: LoraConfig.from_pretrained(folder), "Unexpected keyword arguments .*foobar")
    write(path, {"peft_type": "LORA"})
    return found | {"nothing but its type": type(PeftConfig.from_pretrained(folder)).__name__}


@probe
def enumerations():
    return {
        "value": [PeftType.LORA.value, PeftType.LORA.name, PeftType.LORA == "LORA", PeftType("LORA") is PeftType.LORA],
        "mapping": {PeftType.LORA: 1}.get("LORA"),
        "members": [n for n in ("LORA", "IA3", "LN_TUNING", "SHADOW") if n in PeftType.__members__],
        "tasks": sorted(t.value for t in TaskType),
        "pickled": type(pickle.loads(pickle.dumps(LoraConfig(r=2)))).__name__,
    }


# ---- injected, copied, compiled -------------------------------------------------------------------------------------
@probe
def injecting():
    model = MLP()
    same = inject_adapter_in_model(lora(modules_to_save=["lin1"]), model) is model
    found = {"same": same, "names": [names(model, True), names(model, False)], "marks": hasattr(model, "peft_config")}
    tensors = get_peft_model_state_dict(model)
    found["file"] = shapes(tensors)
    found["by state dict"] = names(inject_adapter_in_model(lora(), MLP(), state_dict=tensors), True)
    other = {"lin1.lora_A.weight": torch.zeros(8, 20), "lin1.lora_B.weight": torch.zeros(2, 8)}
    found["other words"] = warns(lambda: inject_adapter_in_model(lora(), MLP(), state_dict=other), "inconsistency")
    found["status"] = [s.name for s in get_layer_status(model)]
    return found


@probe
def copies():
    model = mlp()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    zeros = {n: p * 0 for n, p in model.named_parameters()}
    return {
        "deep copy": torch.equal(twin(X), model(X)) and twin.base_model is not model.base_model,
        "compiled": torch.allclose(compiled(X), model(X)),
        "functional": float(torch.func.functional_call(model, zeros, (X,)).sum()),
    }


@probe
def generating():
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    names_of_rows = ["default", "__base__"]
    mixed = model.generate(input_ids=IDS, adapter_names=names_of_rows, max_new_tokens=2, do_sample=False)
    return {
        "class": [type(model).__name__, type(model.get_base_model()).__name__, model.config.model_type],
        "shapes": [list(model(input_ids=IDS).logits.shape), list(mixed.shape)],
        "length": fails(lambda: model(input_ids=IDS, adapter_names=["default"]), "Length of `adapter_names`"),
        "unknown": fails(lambda: model(input_ids=IDS, adapter_names=["a", "b"]), "non-existing adapter"),
    }


@probe
def places():
    def targets(**options):
        return sorted(get_peft_model(llama(), LoraConfig(**options)).base_model.targeted_module_names)

    return {
        "by table": targets(),
        "all-linear": targets(target_modules="all-linear"),
        "less some": targets(target_modules="all-linear", exclude_modules=["down_proj"]),
        "expression": targets(target_modules=r".*\.q_proj"),
        "one layer": targets(target_modules=["q_proj"], layers_to_transform=[1]),
        "one name is wrong": targets(target_modules=["q_proj", "nowhere"]),
        "a saved module is nowhere": targets(target_modules=["q_proj"], modules_to_save=["nowhere"]),
    }


@probe
def patterns():
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3, "v_proj": 5},
        alpha_pattern={"^model.layers.1.*q_proj": 7},
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: [m.r["default"], m.scaling["default"]] for n, m in layers.items()}


# ---- refusals -------------------------------------------------------------------------------------------------------
@probe
def refusals():
    model = mlp()
    broken = mlp()
    with torch.no_grad():
        broken.base_model.model.lin0.lora_A["default"].weight.fill_(float("nan"))
    cases = {
        "target": (lambda: mlp(lora(target_modules=["foo"])), r"Target modules .*foo.* not found"),
        "expression": (lambda: mlp(lora(target_modules="foo.*")), r"Target modules .*foo.* not found"),
        "empty": (lambda: mlp(lora(target_modules=[])), "No `target_modules` passed"),
        "none": (lambda: mlp(lora(target_modules=None)), "Please specify"),
        "excluded": (lambda: mlp(lora(exclude_modules=["lin0"])), "No modules were targeted"),
        "rank": (lambda: mlp(lora(r=0)), "`r` should be a positive integer"),
        "start": (lambda: mlp(lora(init_lora_weights="foo")), "Unknown initialization"),
        "task": (lambda: LoraConfig(task_type="foo"), "Invalid task type: 'foo'"),
        "field": (lambda: LoraConfig(foo=1), "unexpected keyword argument"),
        "twice": (lambda: model.add_adapter("default", lora()), "'default' already exists"),
        "choose": (lambda: model.set_adapter("nope"), "Adapter nope not found"),
        "delete": (lambda: model.delete_adapter("nope"), "Adapter nope does not exist"),
        "merge": (lambda: broken.merge_and_unload(safe_merge=True), "NaNs detected in the merged weights"),
        "save": (lambda: model.save_pretrained(__file__), "should be a directory, not a file"),
        "selected": (lambda: model.save_pretrained("/tmp/x", selected_adapters=["a"]), "invalid `selected_adapters`"),
        "folder": (lambda: PeftModel.from_pretrained(MLP(), "/no/where"), "Can't find 'adapter_config.json' at"),
        "config": (lambda: PeftModel.from_pretrained(MLP(), "/no", config="x"), "must be a PeftConfig"),
        "status": (lambda: get_layer_status(MLP()), "No adapter layers found in the model"),
        "layers": (lambda: LoraConfig(target_modules="x", layers_to_transform=[1]), "layers_to_transform"),
        "pattern": (lambda: LoraConfig(target_modules=["x"], layers_pattern="l"), "layers_pattern"),
    }
    found = {name: fails(*case) for name, case in cases.items()}
    missing = isinstance(_caught(lambda: mlp(lora(target_modules=["foo"]))), peft.NoMatchingPeftModuleError)
    return found | {"by its class": missing}


def _caught(call):
    try:
        call()
    except Exception as error:
        return error


def main() -> None:
    found = {}
    for name, function in PROBES.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = function()
            except Exception as error:
                found[name] = {"THE PROBE FAILED": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(found, file, default=repr)


if __name__ == "__main__":
    main()
