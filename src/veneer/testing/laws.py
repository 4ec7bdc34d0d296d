"""What every method guarantees at every kind of layer it sits at."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.testing.kinds import ALL, KINDS
from veneer.testing.row import Row


def config_for(row: Row, kind: str) -> PeftConfig:
    """The row's settings, aimed at the layer of this kind."""
    return row.make(**KINDS[kind].targets)


def base_model(kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor]:
    """The frozen model of this kind, always the same, and an input for it."""
    torch.manual_seed(0)
    model = KINDS[kind].build().eval().to(dtype)
    model.requires_grad_(False)
    x = KINDS[kind].inputs()
    return model, x.to(dtype) if x.is_floating_point() else x


def planted(
    row: Row, kind: str, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("a",), rounded: bool = False
) -> tuple[Tuner, torch.Tensor]:
    """A tuner whose adapters all have random (small) trained values; the first is active.

    ``rounded``: the base's weights hold the digits of bfloat16 only.
    """
    model, x = base_model(kind, dtype)
    model = model.to(torch.bfloat16).to(dtype) if rounded else model
    tuner = Tuner(model)
    for seed, name in enumerate(names):
        torch.manual_seed(seed + 1)
        tuner.add(name, config_for(row, kind))
        randomise(tuner, name, seed)
    tuner.set_active(names[0])
    return tuner.eval(), x


def randomise(tuner: Tuner, name: str, seed: int = 0) -> None:
    """Move an adapter's trained tensors a little, as training would."""
    generator = torch.Generator().manual_seed(seed + 100)
    fixed = {id(p) for _, a in tuner.adapters(name) for n, p in a.named_parameters() if n in a.fixed}
    modules = [a for _, a in tuner.adapters(name)] + ([tuner.shared[name]] if name in tuner.shared else [])
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if id(parameter) not in fixed and parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit."""
    return torch.equal(a, b)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Equal up to ``tolerance``, relative to the largest entry where that is above 1."""
    return bool((a.detach() - b.detach()).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max())))


def every(rows: Sequence[Row]) -> list[Any]:
    """Each row at each kind of layer it is tested at."""
    return [_case(row, kind) for row in rows for kind in sorted(row.tested or row.kinds)]


def refused(rows: Sequence[Row]) -> list[Any]:
    """Each row at each kind of layer that its method cannot sit at."""
    return [_case(row, kind) for row in rows for kind in sorted(ALL - row.kinds) if not row.tested]


def compiled(rows: Sequence[Row]) -> list[Any]:
    """A sample of ``every``, for what takes long."""
    return [case for case in every(rows) if case.values[1] in ("linear", "conv2d", "embedding", "experts")]


def _case(row: Row, kind: str) -> Any:
    return pytest.param(row, kind, id=f"{row.name}-{kind}")


def over(cases: Callable[[Sequence[Row]], list[Any]]) -> Callable[[Any], Any]:
    """Say which cases a law is run over."""

    def mark(law: Any) -> Any:
        law.cases = cases
        return law

    return mark


class Laws:
    """The laws, to be subclassed: each becomes a test for every row and kind of layer.

    Attributes:
        rows: the method with its noteworthy options.
    """

    rows: ClassVar[Sequence[Row]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, law in inspect.getmembers(Laws, inspect.isfunction):
            if hasattr(law, "cases"):
                cases = law.cases(cls.rows)
                setattr(cls, name, pytest.mark.parametrize(("row", "kind"), cases)(_twin(law)) if cases else None)

    @over(every)
    def test_start_is_the_base(self, row: Row, kind: str) -> None:
        model, x = base_model(kind)
        expected = model(x)
        torch.manual_seed(1)
        tuner = Tuner(model)
        tuner.add("a", config_for(row, kind))
        tuner.set_active("a")
        y = tuner.eval()(x)
        assert y.dtype == expected.dtype
        if row.zero_start:
            assert near(y, expected, row.start_tolerance or 1e-6)
        else:
            assert not near(y, expected, 1e-7)

    @over(every)
    def test_trained_changes_the_output_and_off_is_the_base(self, row: Row, kind: str) -> None:
        expected = base_model(kind)[0](base_model(kind)[1])
        tuner, x = planted(row, kind)
        assert not near(tuner(x), expected, 1e-6)
        with tuner.disabled():
            assert same(tuner(x), expected)
        tuner.set_active()
        assert same(tuner(x), expected)

    @over(every)
    def test_merge_equals_forward_and_unmerge_restores_the_objects(self, row: Row, kind: str) -> None:
        tuner, x = planted(row, kind)
        layer = [h.site.module for h in tuner.hosts()]
        before = [dict(m.named_parameters()) for m in layer]
        bits = [{k: p.clone() for k, p in d.items()} for d in before]
        y = tuner(x)
        if not row.merges_at(kind):
            with pytest.raises(ValueError, match=r"merge"):
                tuner.merge()
        else:
            tuner.merge()
            assert near(tuner(x), y, row.tolerance)
            with tuner.disabled():
                assert same(tuner(x), base_model(kind)[0](x))
            tuner.unmerge()
        assert same(tuner(x), y)
        for module, old, values in zip(layer, before, bits, strict=True):
            now = dict(module.named_parameters())
            assert all(now[k] is old[k] and same(now[k], values[k]) for k in old)

    @over(every)
    def test_unload_leaves_no_trace(self, row: Row, kind: str) -> None:
        fresh, x = base_model(kind)
        expected, modules = fresh(x), {n: type(m) for n, m in fresh.named_modules()}
        tuner, _ = planted(row, kind)
        y = tuner(x)
        bare = copy.deepcopy(tuner).unload()
        assert {n: type(m) for n, m in bare.named_modules()} == modules
        assert bare.state_dict().keys() == fresh.state_dict().keys()
        assert same(bare(x), expected)
        if row.merges_at(kind):
            merged = tuner.unload(merge=True)
            assert merged.state_dict().keys() >= fresh.state_dict().keys()
            assert near(merged(x), y, row.tolerance)

    @over(every)
    def test_saved_and_loaded_is_the_same(self, row: Row, kind: str, tmp_path: Path) -> None:
        tuner, x = planted(row, kind)
        tensors = checkpoint.tensors(tuner, "a")
        assert tensors and all(not k.split(".")[-1].startswith("a.") for k in tensors)
        checkpoint.write(tmp_path, tensors)
        checkpoint.config(tuner, "a").write(tmp_path)
        model, _ = base_model(kind)
        again = Tuner(model)
        torch.manual_seed(77)
        again.add("other", PeftConfig.read(tmp_path))
        report = checkpoint.put(again, "other", checkpoint.read(tmp_path))
        assert report.clean and report.loaded
        again.set_active("other")
        assert near(again.eval()(x), tuner(x), max(1e-6, row.start_tolerance))
        assert checkpoint.tensors(again, "other").keys() == tensors.keys()

    @over(every)
    def test_gradients_only_where_they_belong(self, row: Row, kind: str) -> None:
        tuner, x = planted(row, kind, names=("a", "b"))
        tuner(x).square().sum().backward()
        own = {id(p) for _, a in tuner.adapters("a") for p in a.parameters()}
        own |= {id(p) for p in tuner.shared["a"].parameters()} if "a" in tuner.shared else set()
        for name, parameter in tuner.named_parameters():
            if id(parameter) not in own:
                assert parameter.grad is None and not parameter.requires_grad, name
            elif parameter.requires_grad and not name.endswith(row.gradient_free or ("<none>",)):
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert any(p.requires_grad for p in tuner.parameters())

    @over(every)
    def test_two_adapters_do_not_see_each_other(self, row: Row, kind: str) -> None:
        alone, x = planted(row, kind)
        both, _ = planted(row, kind, names=("a", "b"))
        assert near(both(x), alone(x), 1e-6)
        assert checkpoint.tensors(both, "a").keys() == checkpoint.tensors(both, "b").keys()
        y = both(x)
        both.delete("b")
        assert same(both(x), y)
        both.rename("a", "c")
        assert same(both(x), y)

    @over(every)
    def test_rows_of_a_mixed_batch_equal_each_alone(self, row: Row, kind: str) -> None:
        tuner, x = planted(row, kind, names=("a", "b"))
        if any(h.adapters[n].residual is not None for n in ("a", "b") for h in tuner.hosts(n)):
            with pytest.raises(ValueError, match="batch"):
                tuner.route(["a", "b", "__base__", "a"])
            return
        each = {}
        for name in ("a", "b"):
            tuner.set_active(name)
            each[name] = tuner(x)
        with tuner.disabled():
            each["__base__"] = tuner(x)
        names = ["a", "b", "__base__", "a"]
        tuner.route(names)
        mixed = tuner(x)
        tuner.route(None)
        for i, name in enumerate(names):
            assert near(mixed[i], each[name][i], 1e-5), name

    @over(every)
    def test_deep_copy_and_pickle_are_independent_twins(self, row: Row, kind: str) -> None:
        tuner, x = planted(row, kind)
        y = tuner(x)
        for twin in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
            assert same(twin(x), y)
            assert twin.state is not tuner.state and all(h.state is twin.state for h in twin.hosts())
            with twin.disabled():
                assert same(tuner(x), y)

    @over(every)
    def test_half_precision_base_keeps_its_dtype(self, row: Row, kind: str) -> None:
        tuner, x = planted(row, kind, torch.bfloat16)
        y = tuner(x)
        assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
        reference, x32 = planted(row, kind, rounded=True)  # a start may be read off the weight, digit by digit
        assert near(y.float(), reference(x32), 0.15)
        if row.merges_at(kind):
            tuner.merge()
            assert near(tuner(x).float(), y.float(), 0.1)

    @over(every)
    def test_checkpointed_gradients_equal(self, row: Row, kind: str) -> None:
        def gradients(checkpointed: bool) -> list[torch.Tensor]:
            tuner, x = planted(row, kind)
            tuner.train()
            torch.manual_seed(5)
            again = torch.utils.checkpoint.checkpoint
            run = (lambda v: again(tuner, v, use_reentrant=False)) if checkpointed else tuner
            run(x).square().sum().backward()
            return [p.grad for p in tuner.parameters() if p.grad is not None]

        plain, again = gradients(False), gradients(True)
        assert len(plain) == len(again) and all(near(a, b, 1e-6) for a, b in zip(plain, again, strict=True))

    @over(refused)
    def test_a_layer_it_cannot_sit_at_is_refused_before_anything_changes(self, row: Row, kind: str) -> None:
        model, x = base_model(kind)
        expected = model(x)
        tuner = Tuner(model)
        with pytest.raises((ValueError, NotImplementedError)) as error:
            tuner.add("a", config_for(row, kind))
        assert len(str(error.value).split()) > 6
        assert not tuner.configs and same(tuner(x), expected)

    @over(compiled)
    def test_compiles_into_one_graph(self, row: Row, kind: str) -> None:
        torch._dynamo.reset()
        tuner, x = planted(row, kind)
        y = tuner(x)
        compiled = torch.compile(tuner, backend="eager", fullgraph=True)
        assert near(compiled(x), y, 1e-5)


def _twin(law: Any) -> Any:
    """The same function as another object: a mark stays on the object it is put on."""
    twin = type(law)(law.__code__, law.__globals__, law.__name__, law.__defaults__, law.__closure__)
    twin.__annotations__ = law.__annotations__
    return twin
