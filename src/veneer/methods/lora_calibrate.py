"""Starts of LoRA from data: EVA, CorDA, LoRA-GA.

    EVA (Paischer et al., 2024, arXiv:2410.07170)     A = the r leading directions of the layer's inputs, B = 0
    CorDA (Yang et al., 2024, arXiv:2406.05223)       W C = U S V^T, C = mean of X^T X;  s B A = U_I S_I V_I^T C^-1
    LoRA-GA (Wang et al., 2024, arXiv:2407.05000)     G = U S V^T;  A = c V_{1..r}^T,  B = c U_{r+1..2r}

with inputs X (n, in), W and its mean gradient G (out, in), s the adapter's scale, I the leading (ipm) or trailing (kpm)
triplets, and c = d^(1/4) / gamma^(1/2), d = out. CorDA and LoRA-GA leave W - s B A as the base. One step of gradient
descent then moves LoRA-GA's weight along the best rank-2r part of -G, by s^2 sqrt(d) / gamma times the learning rate.
EVA gives the ranks to the layers whose inputs they explain best. Cost: a few dozen batches forward, for LoRA-GA also
backward; each gradient leaves the device as soon as it is there, so that no two layers' are held at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.methods.lora import Lora, LoraConfig, start
from veneer.methods.lora_init import balanced, base_matrices, check_splits, each
from veneer.methods.lora_options import CordaConfig, LoraGAConfig
from veneer.methods.lora_split import place, split
from veneer.ops.factor import bottom_svd, top_svd
from veneer.ops.running import RunningCovariance, RunningSvd, inverted

FOUND: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""layer -> what the data said of it, by the parameter's name ("" where it is the layer's weight)."""
NEEDS_DATA = frozenset({"eva", "corda", "lora_ga"})


def note(site: Site, finding: Tensor) -> None:
    """Keep what was found at a site, for the start of the next adapter made at it."""
    FOUND.setdefault(site.module, {})[site.parameter or ""] = finding


def forget(sites: Iterable[Site]) -> None:
    """Drop what ``note`` kept."""
    for site in sites:
        FOUND.pop(site.module, None)


def _found(lora: Lora) -> Tensor | None:
    """What was kept for this layer; it is used up."""
    return FOUND.get(lora.site.module, {}).pop(lora.site.parameter or "", None)


# ---- the starts -----------------------------------------------------------------------------------------------------
@start("eva")
def eva(lora: Lora, config: LoraConfig) -> None:
    """B = 0 and A the directions that were found; plain LoRA where the data has not been read yet."""
    directions = _found(lora)
    if directions is not None:
        place(lora, directions[: lora.r], torch.zeros_like(lora.matrices()[1]))


@start("corda")
def corda(lora: Lora, config: LoraConfig) -> None:
    """From the covariance of the layer's inputs; plain LoRA where the data has not been read yet."""
    covariance = _found(lora)
    if covariance is None:
        return
    check_splits(lora, "corda")
    how = config.corda_config or CordaConfig()
    c, inverse = inverted(covariance.to(lora.site.device))

    def triplets(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
        wide = w.double() @ c
        u, values, v = top_svd(wide, r) if how.corda_method == "ipm" else bottom_svd(wide, r)
        a, b = balanced((u, values, v), lora.scaling)
        return (a @ inverse).to(w), b.to(w)

    split(lora, *each(lora, triplets))


@start("lora_ga")
def lora_ga(lora: Lora, config: LoraConfig) -> None:
    """From the gradient of the weight; plain LoRA where there is none (an expert that no token reached)."""
    gradient = _found(lora)
    if gradient is None:
        return
    check_splits(lora, "lora_ga", times=2)
    gradient = gradient.to(lora.site.device)
    if not torch.isfinite(gradient).all() or not gradient.any():
        a, b = lora.matrices()
        split(lora, a.detach().clone(), torch.zeros_like(b))
        return
    how = config.lora_ga_config or LoraGAConfig()
    g, w = (m.reshape(-1, *m.shape[-2:]) for m in (base_matrices(lora, gradient), base_matrices(lora)))
    pairs = [_aligned(g_i, w_i, lora, how) for g_i, w_i in zip(g, w, strict=True)]
    own = lora.matrices()
    split(lora, *(torch.stack(m).reshape(o.shape) for m, o in zip(zip(*pairs, strict=True), own, strict=True)))


def _aligned(g: Tensor, w: Tensor, lora: Lora, how: LoraGAConfig) -> tuple[Tensor, Tensor]:
    """(A, B) for one matrix: complementary singular vectors of G, scaled (section 3 of the paper)."""
    r = lora.matrices()[0].shape[-2]
    u, _, v = top_svd(g, 2 * r)
    of_a, of_b = {
        "ArB2r": (range(r), range(r, 2 * r)),
        "A2rBr": (range(r, 2 * r), range(r)),
        "ArBr": (range(1, 2 * r, 2), range(0, 2 * r, 2)),
        "random": torch.randperm(2 * r, generator=torch.Generator().manual_seed(0)).split(r),
    }[how.direction]
    a, b = v[:, list(of_a)].T, u[:, list(of_b)]
    if how.scale == "stable":
        c = w.shape[0] ** 0.25 / how.stable_gamma**0.5
    elif how.scale == "gd_scale":
        c = 1 / lora.scaling
    elif how.scale == "weight_svd":
        c = float((top_svd(w, r)[1] / lora.scaling).sqrt().mean())
    else:
        c = 1.0
    return c * a, c * b


# ---- what the data says ---------------------------------------------------------------------------------------------
Forward = Callable[[Any], Any]
Mask = Callable[[Any], Tensor | None]
"""batch -> (batch, length), True where a token counts; or None where all do."""


def seen_inputs(sites: Sequence[Site], method: str) -> None:
    """Refuse sites whose inputs are no rows of features.

    Raises:
        ValueError: names the site and the way out.
    """
    for site in sites:
        if site.kind not in ("linear", "conv1d_hf"):
            raise ValueError(
                f"{method} reads the inputs of linear layers, but '{site.path}' is of the kind {site.kind}; take it "
                "out of the targets."
            )


@contextlib.contextmanager
def _listening(sites: Sequence[Site], hear: Callable[[Site, Tensor], None]) -> Iterator[dict[Site, Any]]:
    """Within: ``hear(site, x)`` at every call of a site's layer, x (rows, in) as it came."""

    def hook(site: Site) -> Any:
        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hear(site, args[0] if args else next(iter(kwargs.values())))

        return site.module.register_forward_pre_hook(called, with_kwargs=True)

    handles = {site: hook(site) for site in sites}
    try:
        yield handles
    finally:
        for handle in handles.values():
            handle.remove()


@torch.no_grad()
def input_directions(
    sites: Sequence[Site], components: dict[Site, int], batches: Iterable[Any], run: Forward, mask: Mask, tau: float
) -> dict[Site, RunningSvd]:
    """EVA's pass: the leading directions of each site's inputs, until all of them stand still.

    Layers that are given the same tensor (query, key and value) share one decomposition.

    Args:
        sites: linear sites.
        components: how many directions of each.
        batches: the data; read until it ends or every layer's directions have turned by less than 1 - tau.
        run: runs the bare base model on a batch.
        mask: which tokens count.
        tau: the cosine from which a direction counts as still.

    Raises:
        ValueError: a layer saw no row.
    """
    running = {site: RunningSvd(components[site]) for site in sites}
    leader: dict[Site, Site] = {}
    counted: Tensor | None = None
    last: tuple[Tensor, Site] | None = None

    def hear(site: Site, x: Tensor) -> None:
        nonlocal last
        if last is not None and last[0] is x and components[last[1]] == components[site]:
            leader.setdefault(site, last[1])
            return
        last = (x, site)
        leader.pop(site, None)  # it had its input to itself this time
        rows = x[counted] if counted is not None and x.shape[:2] == counted.shape else x.reshape(-1, x.shape[-1])
        if len(rows) and running[site].turned > 1 - tau:
            running[site].add(rows)

    with _listening(sites, hear):
        for batch in batches:
            counted, last = mask(batch), None
            run(batch)
            own = [r for site, r in running.items() if site not in leader]
            if all(r.turned <= 1 - tau for r in own):
                break
    found = {site: running[leader.get(site, site)] for site in running}
    unseen = [site for site, r in found.items() if r.directions is None]
    if unseen:
        raise ValueError(
            f"The data never reached '{unseen[0].path}', so there are no input directions to start it from."
        )
    return found


def shared_ranks(found: dict[Site, RunningSvd], ranks: dict[Site, int]) -> dict[Site, int]:
    """EVA's ranks: the budget sum(ranks) goes to the directions that explain the most of their layer's inputs."""
    pooled = sorted(((float(x), site) for site, r in found.items() for x in r.ratio), key=lambda p: -p[0])
    out = dict.fromkeys(found, 0)
    for _, site in pooled[: sum(ranks.values())]:
        out[site] += 1
    return out


@torch.no_grad()
def input_covariances(
    sites: Sequence[Site], batches: Iterable[Any], run: Forward, mask: Mask = lambda batch: None
) -> dict[Site, Tensor]:
    """CorDA's pass: C (in, in) of each site's inputs."""
    running = {site: RunningCovariance() for site in sites}
    counted: Tensor | None = None

    def hear(site: Site, x: Tensor) -> None:
        rows = x[counted] if counted is not None and x.shape[:2] == counted.shape else x.reshape(-1, x.shape[-1])
        if len(rows):
            running[site].add(rows)

    with _listening(sites, hear):
        for batch in batches:
            counted = mask(batch)
            run(batch)
    unseen = [site for site, r in running.items() if r.sum is None]
    if unseen:
        raise ValueError(f"The data never reached '{unseen[0].path}', so there is no covariance to start it from.")
    return {site: averaged(r.mean) for site, r in running.items()}


@contextlib.contextmanager
def gathered_gradients(sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Within: each backward adds up the gradients of the sites' weights; the dict holds the sums once it is left.

    A gradient is taken off its parameter, to the CPU, the moment it is complete, so at most one is on the device.

    Raises:
        ValueError: a weight that has no gradient because it is packed.
    """
    packed = [site for site in sites if not site.stored.is_floating_point()]
    if packed:
        raise ValueError(
            f"LoRA-GA needs the gradient of the weight of '{packed[0].path}', which is stored as "
            f"{packed[0].stored.dtype}; load the base in float32 or bfloat16 for this pass."
        )
    sums: dict[int, Tensor] = {}

    def taken(parameter: Tensor) -> None:
        here = parameter.grad.detach().to("cpu", torch.float32)
        sums[id(parameter)] = here.clone() if id(parameter) not in sums else sums[id(parameter)].add_(here)
        parameter.grad = None

    parameters = list({id(site.stored): site.stored for site in sites}.values())
    before = [p.requires_grad for p in parameters]
    handles = []
    gradients: dict[Site, Tensor] = {}
    try:
        for p in parameters:
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(taken))
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for p, was in zip(parameters, before, strict=True):
            p.requires_grad_(was)
            p.grad = None
    for site in sites:
        own = sums.get(id(site.stored))
        own = torch.zeros(site.stored.shape) if own is None else own
        # the stored layout is the weight's own or its transpose, which undoes itself
        gradients[site] = averaged(site._stored_form(own))


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def averaged(x: Tensor) -> Tensor:
    """The mean over all processes, where there are several."""
    if not _several():
        return x
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    there = x.to(device, copy=True)
    torch.distributed.all_reduce(there)
    return (there / torch.distributed.get_world_size()).to(x.device)


def agreed(found: list[Tensor]) -> list[Tensor]:
    """What the first process found, on all of them: shapes (ranks) must not differ."""
    if not _several():
        return found
    out: list[Any] = [None] * len(found)
    if torch.distributed.get_rank() == 0:
        out = [x.cpu() for x in found]
    torch.distributed.broadcast_object_list(out, src=0)
    return [x.to(own.device) for x, own in zip(out, found, strict=True)]
