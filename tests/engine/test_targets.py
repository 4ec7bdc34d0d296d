"""What the words of a config mean in a model, and what is said when they mean nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from golden.bases import build
from veneer.core.patterns import fullmatch, nearest, search_suffix
from veneer.engine.targets import find, find_named, is_linear, walk

NAMES = ["q_proj", "k_proj", "head", "subhead", "proj", "mlp", "up"]


def config(**fields):
    return SimpleNamespace(**fields)


def paths(model, strict=None, **fields):
    return [target.name for target in find(model, config(**fields), strict=strict)]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2, 8, 4))
        self.down = nn.Parameter(torch.zeros(2, 4, 4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.experts = Experts()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)


class Model(nn.Module):
    """A small model with a body in ``layers``, an embedding, an output head and a classifier."""

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.classifier = Head()
        self.lm_head = nn.Linear(4, 10)

    def get_output_embeddings(self):
        return self.lm_head


class Wrapper(nn.Module):
    """What the engine puts around a layer, as far as targeting needs to know it."""

    is_adapted = True

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.adapters = nn.ModuleDict({"default": nn.Linear(4, 4)})


# ---- names -----------------------------------------------------------------------------------------------------------
segments = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)


def tree(all_parts):
    """A model with a Linear at each of the dotted paths (a path that leads through a Linear ends there)."""
    root = nn.Module()
    for parts in all_parts:
        node = root
        for part in parts[:-1]:
            child = node._modules.setdefault(part, nn.Module())
            if isinstance(child, nn.Linear):
                break
            node = child
        else:
            node._modules.setdefault(parts[-1], nn.Linear(2, 2))
    return root


@given(st.lists(segments, min_size=1, max_size=12), st.lists(segments, min_size=1, max_size=3))
def test_a_list_means_whole_paths_and_ends_at_a_dot(all_parts, wanted):
    model, names = tree(all_parts), [".".join(parts) for parts in wanted]
    expected = [p for p, _ in model.named_modules() if any(p == n or p.endswith("." + n) for n in names)]
    if expected:
        assert paths(model, strict=False, target_modules=names) == expected
    else:
        with pytest.raises(ValueError, match="No module of Module matches"):
            paths(model, strict=False, target_modules=names)


@given(st.lists(segments, min_size=1, max_size=12), st.sampled_from(NAMES))
def test_a_module_with_another_name_changes_nothing(all_parts, name):
    model = tree(all_parts)
    model.add_module(name, nn.Linear(2, 2))
    before = paths(model, target_modules=[name])
    model.add_module("something_else", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert paths(model, target_modules=[name]) == before


@given(st.lists(segments, min_size=1, max_size=12))
def test_the_order_is_the_models_whatever_the_order_of_the_list(all_parts):
    model = tree(all_parts)
    leaves = sorted({p.split(".")[-1] for p, m in model.named_modules() if p})
    assert paths(model, target_modules=leaves) == paths(model, target_modules=leaves[::-1])
    assert paths(model, target_modules=leaves) == [p for p, _ in model.named_modules() if p]


@given(st.lists(segments, min_size=1, max_size=10))
def test_a_str_is_a_regular_expression_for_the_whole_path(all_parts):
    model = tree(all_parts)
    expected = [p for p, _ in model.named_modules() if re.fullmatch(r".*\.(head|up)", p)]
    if expected:
        assert paths(model, target_modules=r".*\.(head|up)") == expected
    else:
        with pytest.raises(ValueError, match="No module of Module matches"):
            paths(model, target_modules=r".*\.(head|up)")


def test_a_module_that_stands_in_two_places_is_found_once():
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert paths(model, strict=False, target_modules=["first", "second"]) == ["first"]


# ---- all-linear ------------------------------------------------------------------------------------------------------
@given(st.lists(segments, min_size=1, max_size=12))
def test_all_linear_is_every_linear_but_the_output_embedding(all_parts):
    model = tree(all_parts)
    linears = [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    model.get_output_embeddings = lambda: model.get_submodule(linears[-1])
    if len(linears) > 1:
        assert paths(model, target_modules="all-linear") == linears[:-1]
    else:
        with pytest.raises(ValueError, match="no linear layer"):
            paths(model, target_modules="all-linear")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_all_linear_leaves_the_tasks_head_alone(task):
    found = paths(Model(), target_modules="all-linear", task_type=task)
    assert "model.layers.0.attn.q_proj" in found
    assert not [p for p in found if p.startswith("classifier") or p == "lm_head"]
    assert "classifier.dense" in paths(Model(), target_modules="all-linear")


def test_all_linear_knows_what_stands_for_a_linear():
    class Conv1D(nn.Module):  # transformers' turned Linear
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 4, nn.Parameter(torch.zeros(4, 4))

    class PackedLinear(nn.Module):  # keeps no weight, as GPTQ's and AWQ's do
        in_features = out_features = 4

    class Router(nn.Module):  # counts features but is no 2-D map
        in_features = out_features = 4
        weight = torch.zeros(4)

    assert is_linear(Conv1D())
    assert is_linear(PackedLinear())
    assert is_linear(type("LoudLinear", (nn.Linear,), {})(2, 2))
    assert not is_linear(Router())
    assert not is_linear(nn.Embedding(2, 2))
    assert not is_linear(nn.Bilinear(2, 2, 2))


def test_all_linear_skips_the_projection_that_attention_never_calls():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert paths(model, target_modules="all-linear") == ["1"]
    assert paths(model, target_modules=["out_proj"]) == ["0.out_proj"]


# ---- what is taken out again -----------------------------------------------------------------------------------------
def test_excluded_modules_are_left_out():
    model = Model()
    assert paths(model, target_modules=["q_proj"], exclude_modules=["layers.1.attn.q_proj"]) == [
        "model.layers.0.attn.q_proj",
        "model.layers.2.attn.q_proj",
    ]
    assert paths(model, target_modules=["q_proj"], exclude_modules=r"model\.layers\.[01]\..*") == [
        "model.layers.2.attn.q_proj"
    ]
    assert paths(model, target_parameters=["experts.down"], exclude_modules=["layers.0.experts"]) == [
        "model.layers.1.experts.down",
        "model.layers.2.experts.down",
    ]


def test_what_trains_as_a_whole_takes_no_adapter():
    found = paths(Model(), target_modules="all-linear", modules_to_save=["classifier"])
    assert not [p for p in found if p.startswith("classifier")]
    with pytest.raises(ValueError, match=r"lies in modules_to_save=\['classifier'\]"):
        paths(Model(), target_modules=["dense"], modules_to_save=["classifier"])


def test_excluding_everything_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"exclude_modules=\['attn.q_proj'\] takes out all 3 modules of Model"):
        paths(Model(), target_modules=["q_proj"], exclude_modules=["attn.q_proj"])


# ---- layers ----------------------------------------------------------------------------------------------------------
@given(st.sets(st.integers(0, 4), min_size=1))
@settings(max_examples=20)
def test_layers_to_transform_keeps_exactly_these_layers(layers):
    found = paths(Model(5), target_modules=["q_proj"], layers_to_transform=sorted(layers))
    assert found == [f"model.layers.{i}.attn.q_proj" for i in sorted(layers)]


def test_one_layer_may_be_an_int_and_parameters_have_layers_too():
    assert paths(Model(), target_modules=["k_proj"], layers_to_transform=0) == ["model.layers.0.attn.k_proj"]
    assert paths(Model(), target_parameters=["experts.down"], layers_to_transform=[1]) == [
        "model.layers.1.experts.down"
    ]


def test_a_name_in_full_has_said_its_layer():
    names = ["model.layers.2.attn.q_proj", "k_proj"]
    assert paths(Model(), target_modules=names, layers_to_transform=[0]) == [
        "model.layers.0.attn.k_proj",
        "model.layers.2.attn.q_proj",
    ]


def test_the_pattern_names_the_list_that_counts():
    model = nn.Module()
    model.block = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.block:
        block.layer = nn.ModuleList(Attention() for _ in range(2))
    assert paths(model, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="block") == [
        "block.1.layer.0.q_proj",
        "block.1.layer.1.q_proj",
    ]
    assert paths(model, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["layer"]) == [
        "block.0.layer.1.q_proj",
        "block.1.layer.1.q_proj",
    ]
    with pytest.raises(ValueError, match=r"can be read in 2 ways for 'block.0.layer.0.q_proj'.*layers_pattern='block'"):
        paths(model, target_modules=["q_proj"], layers_to_transform=[1])
    # A file of the peer's may say it all the same; there the innermost list counts.
    assert paths(model, strict=False, target_modules=["q_proj"], layers_to_transform=[1]) == [
        "block.0.layer.1.q_proj",
        "block.1.layer.1.q_proj",
    ]


def test_contradictions_about_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers_to_transform=\[0\] cannot be used with target_modules='.\*q_proj'"):
        paths(Model(), target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(ValueError, match="layers_pattern needs layers_to_transform"):
        paths(Model(), target_modules=["q_proj"], layers_pattern="layers")
    with pytest.raises(ValueError, match=r"None of the 3 modules .* lies in layers_to_transform=\[7\]"):
        paths(Model(), target_modules=["q_proj"], layers_to_transform=[7])


# ---- parameters ------------------------------------------------------------------------------------------------------
def test_parameters_come_in_the_order_the_module_keeps_them():
    found = find(Model(1), config(target_parameters=["experts.down", "experts.gate_up"], target_modules=["q_proj"]))
    assert [(t.path, t.parameter) for t in found] == [
        ("model.layers.0.attn.q_proj", None),
        ("model.layers.0.experts", "gate_up"),
        ("model.layers.0.experts", "down"),
    ]
    assert isinstance(found[1].module, Experts)


def test_a_parameter_that_is_not_there_is_an_error():
    with pytest.raises(
        ValueError, match=r"No parameter of Model matches \['experts.gate_upp'\] in target_parameters.*gate_up"
    ):
        paths(Model(), target_parameters=["experts.gate_upp", "experts.down"])
    with pytest.raises(TypeError, match=r"must be a list of names, not the str 'experts.down'"):
        paths(Model(), target_parameters="experts.down")


# ---- models that are adapted already ---------------------------------------------------------------------------------
def test_an_adapted_model_is_seen_as_it_was():
    plain, adapted = Model(), Model()
    for layer in adapted.model.layers:
        layer.attn.q_proj = Wrapper(Wrapper(layer.attn.q_proj))
        layer.experts = Wrapper(layer.experts)
    adapted.lm_head = Wrapper(adapted.lm_head)
    assert [p for p, _ in walk(adapted)] == [p for p, _ in walk(plain)]
    for fields in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"target_parameters": ["experts.down"]},
    ):
        assert paths(adapted, **fields) == paths(plain, **fields)
    assert all(not isinstance(t.module, Wrapper) for t in find(adapted, config(target_modules="all-linear")))


# ---- what is said when words mean nothing ----------------------------------------------------------------------------
def test_a_misspelt_name_gets_its_neighbours():
    with pytest.raises(
        ValueError, match=r"No module of Model matches target_modules=\['qproj'\]; nearest names: q_proj"
    ):
        paths(Model(), target_modules=["qproj"])


def test_one_misspelt_name_among_others_is_not_passed_over():
    with pytest.raises(
        ValueError, match=r"No module of Model matches \['kproj'\] in target_modules; nearest names: k_proj"
    ):
        paths(Model(), target_modules=["q_proj", "kproj"])
    assert len(paths(Model(), strict=False, target_modules=["q_proj", "kproj"])) == 3
    # A list in a file may be another's, made for several models; so the peer's files read as they do there.
    assert len(find(Model(), config(target_modules=["q_proj", "kproj"], from_file=True))) == 3
    with pytest.raises(ValueError, match=r"matches exclude_modules=\['atn'\]; nearest names: attn"):
        paths(Model(), target_modules=["q_proj"], exclude_modules=["atn"])


def test_a_name_given_as_a_str_is_explained():
    with pytest.raises(ValueError, match=r"matches target_modules='q_proj'.*write \['q_proj'\]"):
        paths(Model(), target_modules="q_proj")


@pytest.mark.parametrize("fields", [{}, {"target_modules": None}, {"target_modules": []}, {"target_modules": set()}])
def test_nothing_asked_for_is_an_error(fields):
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        paths(Model(), **fields)


def test_an_empty_list_is_a_statement_when_something_else_trains():
    assert paths(Model(), target_modules=[], trainable_token_indices=[1]) == []


# ---- modules_to_save and its kin -------------------------------------------------------------------------------------
@given(st.lists(segments, min_size=1, max_size=12), st.sampled_from(NAMES))
def test_find_named_takes_whole_names_only(all_parts, name):
    model = tree(all_parts)
    expected = [p for p, _ in model.named_modules() if p.split(".")[-1] == name]
    expected = [p for p in expected if not any(p.startswith(q + ".") for q in expected)]
    if expected:
        assert [t.path for t in find_named(model, [name])] == expected
    else:
        with pytest.raises(ValueError, match="matches modules_to_save"):
            find_named(model, [name])


def test_find_named_refuses_typos_and_strings():
    with pytest.raises(
        ValueError, match=r"No module of Model matches \['lmhead'\] in modules_to_save; nearest names: lm_head"
    ):
        find_named(Model(), ["classifier", "lmhead"])
    with pytest.raises(ValueError, match=r"trainable_token_indices must be a list of names.*write \['embed'\]"):
        find_named(Model(), "embed", what="trainable_token_indices")


# ---- patterns --------------------------------------------------------------------------------------------------------
@given(
    st.sampled_from(
        ["q_proj", "attn.q_proj", "^q_proj", "^model.*q_proj", "(q|k)_proj", "q_proj|up", r"layers\.1\..*", ".*up"]
    ),
    st.lists(st.sampled_from([*NAMES, "model", "layers", "1", "attn"]), min_size=1, max_size=5).map(".".join),
)
def test_pattern_keys_are_read_as_the_peer_reads_them(key, path):
    assert search_suffix(key, path) == bool(re.match(rf"(.*\.)?({key})$", path))


@pytest.mark.parametrize("pattern", [r"(a|aa)+b", r"(x+x+)+y", r"(a|a?)+$c?b"])
def test_a_hostile_pattern_is_refused_rather_than_obeyed(pattern):
    model = nn.Module()
    model.add_module("ax" * 40, nn.Linear(1, 1))
    model.add_module("a" * 80, nn.Linear(1, 1))
    model.add_module("x" * 80, nn.Linear(1, 1))
    # Left alone, these would keep a program busy for years.
    with pytest.raises(ValueError, match=r"takes too long to match|No module of Module matches"):
        paths(model, target_modules=pattern)


def test_a_pattern_that_is_slow_on_each_of_many_names_is_refused_too():
    with pytest.raises(ValueError, match=re.escape("The pattern '(a|aa)+b' takes too long")):
        for i in range(5000):
            fullmatch("(a|aa)+b", "a" * 24 + str(i))


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a)|(b"])
def test_a_malformed_pattern_is_named(pattern):
    with pytest.raises(ValueError, match=r"The pattern '.*' is not a valid regular expression"):
        fullmatch(pattern, "a")
    with pytest.raises(ValueError, match=r"The pattern '.*' is not a valid regular expression"):
        search_suffix(pattern, "a")


def test_nearest_names_are_near():
    assert nearest("Qproj", ["down", "k_proj", "q_proj"])[0] == "q_proj"
    assert nearest("zzz", ["q_proj"]) == []


# ---- the peer --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["attn.q_proj", "dense"]},
        {"target_modules": ["model.layers.1.attn.k_proj"]},
        {"target_modules": r".*\.[01]\.attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.attn.k_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["embed", "lm_head"]},
        {"target_modules": ["q_proj", "dense"], "modules_to_save": ["classifier"]},
        {"target_modules": ["dense"], "target_parameters": ["experts.down", "experts.gate_up"]},
    ],
    ids=str,
)
def test_we_adapt_what_the_peer_adapts(fields):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(**fields))
    assert sorted({t.path for t in find(Model(), config(**fields))}) == adapted_by_peer(theirs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("base", "task"), [("llama", "CAUSAL_LM"), ("llama_classifier", "SEQ_CLS"), ("gpt2", None)])
def test_all_linear_is_what_the_peer_calls_so(base, task):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build(base), peft.LoraConfig(target_modules="all-linear", task_type=task))
    ours = find(build(base), config(target_modules="all-linear", task_type=task))
    assert sorted(t.path for t in ours) == adapted_by_peer(theirs)


def adapted_by_peer(model):
    """The paths of the layers that hold an adapter of the peer's, without its own wrappers' names."""
    names = (n for n, m in model.get_base_model().named_modules() if isinstance(getattr(m, "scaling", None), dict))
    return sorted({name.replace(".base_layer", "") for name in names})
