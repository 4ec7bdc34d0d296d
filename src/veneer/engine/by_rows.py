"""A mixed batch around any layer: each adapter on its own rows of what the layer gave for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.engine.folding import known
from veneer.engine.mergeable import hosts

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted


def by_rows(host: Adapted, route: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The layer of the outermost wrapper ``host``, each row with the adapter that ``route`` names for it."""
    chain = list(hosts(host))
    bare = chain[-1].base_layer
    here = [n for n in dict.fromkeys(route) if any(n in one.adapters for one in chain)]
    if not here:
        return bare(*args, **kwargs)
    x, args = host._first(args, kwargs)
    dim = host.site.batch_dim
    rows = host.state.rows(x.shape[dim], x.device)
    y = bare(x, *args, **kwargs)  # once, for all rows
    # What a module takes besides x, and layers inside it, cannot be cut into rows: such a one runs whole.
    # So does an adapter that looks at the model's inputs, which are those of all rows.
    whole = len(chain) > 1 or args or kwargs or host.site.kind in ("parameter", "opaque")
    whole = whole or any(host.adapters[n].wants for n in here if n in host.adapters)
    for name in here:
        own = rows[name]
        if whole:
            with host.state.only(name):
                part = _rows_of(host(x, *args, **kwargs), own, dim)
        else:
            part = x.index_select(dim, own)
            part = host.around((name,), known(bare, part, _rows_of(y, own, dim)))(part)
        y = _put_rows(y, own, part, dim)
    return y


def _rows_of(value: Any, rows: Tensor, dim: int) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(dim, rows)
    if isinstance(value, tuple):
        return tuple(_rows_of(v, rows, 0 if i else dim) for i, v in enumerate(value))
    return value


def _put_rows(whole: Any, rows: Tensor, part: Any, dim: int) -> Any:
    if isinstance(whole, Tensor):
        return whole.index_copy(dim, rows, part.to(whole.dtype))
    if isinstance(whole, tuple):
        both = enumerate(zip(whole, part, strict=True))
        return tuple(_put_rows(w, rows, p, 0 if i else dim) for i, (w, p) in both)
    return whole
