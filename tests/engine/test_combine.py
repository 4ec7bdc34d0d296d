"""Algebra of adapters: identities, exact sums, the element-wise rules by hand, parity with the peer, refusals."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laws.kinds import KINDS, Chain
from laws.table import rows
from methods.test_lora import Small
from parity import call, near, needs_peer, randomise, read_by_peer
from veneer import LoraConfig
from veneer.core import registry
from veneer.core.adapter import Additive, Stacked
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.combine import RULES, add_weighted_adapter
from veneer.engine.tuner import Tuner
from veneer.ops import combining as ops

SAMPLE = ("linear", "conv2d_grouped", "experts")
KIND_NAMES = ("linear", "conv1d_hf", "conv2d", "conv2d_grouped", "embedding", "mha", "experts")


def additive_kinds(row) -> list[str]:
    """Where a row's method has a delta: everywhere for LoRA's kin, a sample for the others."""
    method = registry.of(row.make(**KINDS["linear"].targets).peft_type)
    if not issubclass(method.build, Additive):
        return []
    names = KIND_NAMES if issubclass(method.config, LoraConfig) else SAMPLE
    return [kind for kind in names if kind in (row.tested or row.kinds) and row.merges_at(kind)]


IDENTITY = [pytest.param(row, kind, id=f"{row.name}-{kind}") for row in rows() for kind in additive_kinds(row)]


def tuner_of(kind: str, make, names: tuple[str, ...] = ("a",)) -> tuple[Tuner, torch.Tensor]:
    torch.manual_seed(0)
    tuner = Tuner(KINDS[kind].build().eval())
    for seed, name in enumerate(names):
        torch.manual_seed(seed + 1)
        tuner.add(name, make(**KINDS[kind].targets))
        fixed = {id(p) for _, a in tuner.adapters(name) for n, p in a.named_parameters() if n in a.fixed}
        own = [p for host in tuner.hosts(name) for p in host.adapters[name].parameters() if id(p) not in fixed]
        own += list(tuner.shared[name].parameters()) if name in tuner.shared else []
        randomise([p for p in own if p.is_floating_point()], seed, 0.2)
    tuner.set_active(names[0])
    return tuner.eval(), KINDS[kind].inputs()


def output(tuner: Tuner, name: str, x: torch.Tensor) -> torch.Tensor:
    tuner.set_active(name)
    with torch.no_grad():
        return tuner(x)


def refusal(tuner: Tuner) -> str | None:
    """Why the adapter "a" has no delta, if it has none."""
    first = tuner.hosts()[0].adapters["a"]
    first = first.each[0] if isinstance(first, Stacked) else first
    if not isinstance(first, Additive):
        return "no sum onto the weight"
    if first.residual is not None and first.delta_factors() is None:
        return "no plain form for the original base"
    return None


@pytest.mark.parametrize(("row", "kind"), IDENTITY)
def test_one_adapter_with_weight_one_is_itself(row, kind: str) -> None:
    tuner, x = tuner_of(kind, row.make)
    if (why := refusal(tuner)) is not None:
        with pytest.raises(ValueError, match=why):
            add_weighted_adapter(tuner, ["a"], [1.0], "c")
        assert list(tuner.configs) == ["a"]
        return
    expected = output(tuner, "a", x)
    for how in ("cat", "linear", "svd"):
        lost = add_weighted_adapter(tuner, ["a"], [1.0], how, how)
        assert max(lost.values()) < 1e-5
        assert near(output(tuner, how, x), expected, 1e-4), how
        assert near(output(tuner, "a", x), expected, 1e-6)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | settings))


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_sums_are_exact_with_negative_weights_other_ranks_and_rslora(kind: str) -> None:
    tuner, x = tuner_of(kind, lora)
    tuner.add("b", lora(r=2, use_rslora=True, **KINDS[kind].targets))
    randomise([p for h in tuner.hosts("b") for p in h.adapters["b"].parameters()], 9, 0.2)
    weight = {h: [_delta(h.adapters[n]) for n in ("a", "b")] for h in tuner.hosts()}
    for how, settings_ in (("cat", {}), ("linear", {}), ("svd", {"svd_rank": 8})):
        add_weighted_adapter(tuner, ["a", "b"], [0.7, -1.3], how, how, **settings_)
        for host, (a, b) in weight.items():
            assert near(_delta(host.adapters[how]), 0.7 * a - 1.3 * b, 1e-5)


def _delta(adapter) -> torch.Tensor:
    return adapter.delta_weight().detach()


def test_svd_is_the_best_approximation_and_says_what_it_costs() -> None:
    tuner, _ = tuner_of("linear", lora, ("a", "b"))
    lost = add_weighted_adapter(tuner, ["a", "b"], [1.0, 1.0], "c", "svd", svd_rank=3)
    host = tuner.hosts("c")[0]
    whole = _delta(host.adapters["a"]) + _delta(host.adapters["b"])
    s = torch.linalg.svdvals(whole)
    error = (whole - _delta(host.adapters["c"])).norm()
    assert torch.allclose(error, s[3:].norm(), rtol=1e-4)
    assert abs(lost["layer"] - float(error / whole.norm())) < 1e-4


def test_never_forms_the_full_matrix() -> None:
    torch.manual_seed(0)
    tuner = Tuner(Chain(None, nn.Linear(3000, 2500)))
    for name in ("a", "b"):
        tuner.add(name, lora(target_modules=["layer"]))
    seen = []
    original = torch.Tensor.__matmul__
    try:
        torch.Tensor.__matmul__ = lambda p, q: seen.append(p.shape[-2] * q.shape[-1]) or original(p, q)
        add_weighted_adapter(tuner, ["a", "b"], [1.0, 2.0], "c", "svd")
    finally:
        torch.Tensor.__matmul__ = original
    assert seen and max(seen) <= 3000 * 8


def test_lora_bias_and_trained_biases_add_up() -> None:
    tuner, x = tuner_of("linear", lambda **t: lora(lora_bias=True, **t), ("a", "b"))
    with tuner.disabled():
        base = tuner(x)
    parts = [output(tuner, n, x) - base for n in ("a", "b")]
    add_weighted_adapter(tuner, ["a", "b"], [0.5, 2.0], "c", "cat")
    assert near(output(tuner, "c", x) - base, 0.5 * parts[0] + 2.0 * parts[1], 1e-5)

    tuner, x = tuner_of("linear", lambda **t: lora(bias="lora_only", **t), ("a", "b"))
    parts = [output(tuner, n, x) - base for n in ("a", "b")]
    add_weighted_adapter(tuner, ["a", "b"], [0.5, 2.0], "c", "linear")
    assert near(output(tuner, "c", x) - base, 0.5 * parts[0] + 2.0 * parts[1], 1e-5)


def small() -> Tuner:
    torch.manual_seed(0)
    return Tuner(Small().eval())


IDS = torch.arange(12).reshape(2, 6)


def test_members_may_sit_at_different_layers_with_patterns_and_a_saved_head(tmp_path) -> None:
    tuner = small()
    tuner.add("a", LoraConfig(r=4, target_modules=["layers.0.q", "v"], rank_pattern={"layers.2.v": 2}))
    tuner.add("b", LoraConfig(r=3, target_modules=r"embed|layers\.[12]\.q", modules_to_save=["head"]))
    for name in ("a", "b"):
        randomise([p for h in tuner.hosts(name) for p in h.adapters[name].parameters()], len(name), 0.1)
    with_both = {h.site.path: [h.adapters[n] for n in ("a", "b") if n in h.adapters] for h in tuner.hosts()}
    sums = {p: sum(_delta(a) for a in each) for p, each in with_both.items() if p != "head"}
    head = tuner.hosts("b")[0].adapters["b"].copy.weight.clone()
    add_weighted_adapter(tuner, ["a", "b"], [1.0, 1.0], "c", "linear")
    expected = output(tuner, "c", IDS)
    for host in tuner.hosts("c"):
        adapter = host.adapters["c"]
        if host.site.path == "head":
            assert torch.equal(adapter.copy.weight, head)
        else:
            assert near(_delta(adapter), sums[host.site.path], 1e-5)
    checkpoint.write(tmp_path, checkpoint.tensors(tuner, "c"))
    tuner.configs["c"].write(tmp_path)
    again = small()
    again.add("c", PeftConfig.read(tmp_path))
    assert checkpoint.put(again, "c", checkpoint.read(tmp_path)).clean
    assert near(output(again, "c", IDS), expected, 1e-6)
    if importlib.util.find_spec("peft"):
        assert near(call(read_by_peer(small().model, tmp_path), IDS), expected, 1e-5)


def test_a_split_start_counts_against_the_original_base() -> None:
    torch.manual_seed(0)
    model, x = Chain(None, nn.Linear(16, 12)).eval(), torch.randn(3, 16)
    tuner = Tuner(model)
    tuner.add("a", LoraConfig(r=4, target_modules=["layer"], init_lora_weights="pissa"))
    randomise([p for h in tuner.hosts("a") for p in h.adapters["a"].parameters()], 1, 0.1)
    expected = output(tuner.eval(), "a", x)
    add_weighted_adapter(tuner, ["a"], [1.0], "c", "cat")
    assert near(output(tuner, "c", x), expected, 1e-5)
    tuner.add("d", LoraConfig(r=4, target_modules=["layer"]))
    add_weighted_adapter(tuner, ["a", "d"], [1.0, 1.0], "e", "svd", svd_rank=12)
    assert near(output(tuner, "e", x), expected, 1e-5)


# ---- element-wise rules ---------------------------------------------------------------------------------------------
def test_largest_keeps_the_largest() -> None:
    t = torch.tensor([[1.0, -5.0, 0.5], [3.0, -0.1, 2.0]])
    assert torch.equal(ops.largest(t, 0.5), torch.tensor([[0.0, -5.0, 0.0], [3.0, 0.0, 2.0]]))
    assert torch.equal(ops.largest(t, 1.0), t)


def test_ties_by_hand() -> None:
    one = torch.tensor([[1.0, -2.0, 3.0]])
    two = torch.tensor([[3.0, 1.0, 0.0]])
    three = torch.tensor([[-1.0, 0.9, 0.0]])
    total = ops.elected([one, two, three], [1.0, 1.0, 1.0], "total")
    assert torch.allclose(total, torch.tensor([[2.0, -2.0, 3.0]]))  # 3 > 0; -0.1 < 0; 3 alone
    frequency = ops.elected([one, two, three], [1.0, 1.0, 1.0], "frequency")
    assert torch.allclose(frequency, torch.tensor([[2.0, 0.95, 3.0]]))
    assert torch.allclose(ops.elected([one, two], [0.5, 2.0], "total"), torch.tensor([[3.25, -1.0, 1.5]]))


@pytest.mark.parametrize(
    "how", ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear", "dare_ties"]
)
def test_one_adapter_at_density_one_is_itself(how: str) -> None:
    tuner, x = tuner_of("linear", lora)
    expected = output(tuner, "a", x)
    add_weighted_adapter(tuner, ["a"], [1.0], "c", how, density=1.0)
    assert near(output(tuner, "c", x), expected, 1e-4)


def test_subtracting_an_adapter_with_ties_is_adding_its_negative() -> None:
    tuner, x = tuner_of("linear", lora, ("a", "b"))
    add_weighted_adapter(tuner, ["b"], [-1.0], "minus_b", "cat")
    add_weighted_adapter(tuner, ["a", "b"], [1.0, -1.0], "c", "ties", density=0.5, svd_rank=8)
    add_weighted_adapter(tuner, ["a", "minus_b"], [1.0, 1.0], "d", "ties", density=0.5, svd_rank=8)
    assert near(output(tuner, "c", x), output(tuner, "d", x), 1e-5)


def test_drops_keep_the_mean_and_follow_the_seed() -> None:
    t = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([ops.dropped(t, 0.3, torch.Generator().manual_seed(i)) for i in range(1000)])
    sigma = t.abs() * (0.7 / 0.3 / 1000) ** 0.5
    assert ((draws.mean(0) - t).abs() <= 5 * sigma + 1e-6).all()
    tuner, x = tuner_of("linear", lora, ("a", "b"))
    for name, seed in (("c", 1), ("d", 1), ("e", 2)):
        add_weighted_adapter(tuner, ["a", "b"], [1.0, 1.0], name, "dare_linear", density=0.5, seed=seed)
    assert torch.equal(output(tuner, "c", x), output(tuner, "d", x))
    assert not near(output(tuner, "c", x), output(tuner, "e", x), 1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31), st.booleans()
)  # fmt: skip
def test_compression_is_the_truncated_svd(m: int, n: int, r: int, keep: int, seed: int, stacked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    lead = (3,) if stacked else ()
    up = torch.randn(*lead, m, r, generator=generator, dtype=torch.float64)
    down = torch.randn(*lead, r, n, generator=generator, dtype=torch.float64)
    (u, d), lost = ops.compressed((up, down), keep)
    assert u.shape[-1] == d.shape[-2] == keep
    s = torch.linalg.svdvals(up @ down)
    error = (up @ down - u @ d).norm()
    assert torch.allclose(error, s[..., keep:].norm(), atol=1e-8)
    assert abs(lost - float(error / s.norm())) < 1e-8


def test_a_share_of_the_energy_takes_the_least_rank_that_holds_it() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [ops.rank_for(s, share) for share in (0.5, 9 / 14, 0.9, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]
    assert ops.rank_for(torch.zeros(4), 0.9) == 1


# ---- the peer -------------------------------------------------------------------------------------------------------
@needs_peer
@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        ("cat", "cat", {}),
        ("svd", "svd", {}),
        ("svd", "svd", {"svd_rank": 3}),
        ("linear", "linear_factors", {}),
        ("ties", "ties_factors", {"density": 0.5}),
        ("ties", "ties_factors", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", "magnitude_prune_factors", {"density": 0.5}),
        ("ties_svd", "ties_svd", {"density": 0.5, "svd_rank": 8}),
        ("magnitude_prune_svd", "magnitude_prune_svd", {"density": 0.5}),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_parity(theirs: str, ours: str, options: dict, kind: str, tmp_path) -> None:
    import peft

    weights = [0.7, 0.4] if "ties" in theirs else [1.0, -0.5]  # the peer elects signs before it turns them
    torch.manual_seed(0)
    base, x = KINDS[kind].build().eval(), KINDS[kind].inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"]), "a"
        )
        model.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]))
    randomise([p for n, p in model.named_parameters() if "lora" in n], 5, 0.3)
    tuner = Tuner(base)
    for name in ("a", "b"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
        tuner.add(name, PeftConfig.read(tmp_path / name))
        checkpoint.put(tuner, name, checkpoint.read(tmp_path / name))
    model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=theirs, **options)
    model.set_adapter("c")
    add_weighted_adapter(tuner, ["a", "b"], weights, "c", ours, **options)
    assert near(output(tuner.eval(), "c", x), call(model.eval(), x), 1e-4)


# ---- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call_", "error"),
    [
        (lambda t: add_weighted_adapter(t, ["a", "z"], [1, 1], "c"), "no adapter named 'z'"),
        (lambda t: add_weighted_adapter(t, ["a", "b"], [1], "c"), "one weight for each"),
        (lambda t: add_weighted_adapter(t, ["a"], [1], "b"), "already exists"),
        (lambda t: add_weighted_adapter(t, ["a"], [1], "c", "mean"), "Invalid combination_type: 'mean'"),
        (lambda t: add_weighted_adapter(t, ["a"], [1], "c", "ties"), "needs a density"),
        (lambda t: add_weighted_adapter(t, ["a"], [1], "c", "ties", density=2.0), "needs a density"),
        (lambda t: add_weighted_adapter(t, ["a", "b"], [1, 1], "c", "linear_factors"), "of one rank"),
        (lambda t: add_weighted_adapter(t, ["a", "h"], [1, 1], "c"), "each hold modules_to_save"),
    ],
)
def test_what_has_no_sum_is_refused_and_nothing_changes(call_, error: str) -> None:
    tuner = small()
    tuner.add("a", LoraConfig(r=4, target_modules=["q"], modules_to_save=["head"]))
    tuner.add("b", LoraConfig(r=2, target_modules=["q"]))
    tuner.add("h", LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    before = list(tuner.configs)
    with pytest.raises(ValueError, match=error):
        call_(tuner)
    assert list(tuner.configs) == before


def test_merged_members_are_asked_to_be_unmerged() -> None:
    tuner, _ = tuner_of("linear", lora)
    tuner.merge()
    with pytest.raises(ValueError, match="unmerge before combining"):
        add_weighted_adapter(tuner, ["a"], [1.0], "c")


def test_every_rule_has_a_name_of_the_peers_or_says_factors() -> None:
    names = {"cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"}
    assert names | {"magnitude_prune", "magnitude_prune_svd"} == {n for n in RULES if not n.endswith("_factors")}
