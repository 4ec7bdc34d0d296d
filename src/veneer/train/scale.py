"""What a LoRA run on many GPUs needs, by calculation: bytes held on each, and bytes each sends in a step.

For N GPUs. A ring all-reduce of S bytes sends 2 S (N - 1) / N per GPU, an all-gather or a reduce-scatter S (N - 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped key-value heads and a gated MLP."""

    layers: int
    hidden: int
    mlp: int
    kv: int
    """Width of the keys: heads x their size."""
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a block's linear layers."""
        h, m, k = self.hidden, self.mlp, self.kv
        return [(h, h), (h, k), (h, k), (h, h), (h, m), (h, m), (m, h)]

    @property
    def block(self) -> int:
        """Parameters of one block, its two norms among them."""
        return sum(i * o for i, o in self.linears) + 2 * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside of the blocks: embedding, head, last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block + self.root

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA at every linear layer of every block: r (in + out) each."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)


LLAMA_70B = Shape(layers=80, hidden=8192, mlp=28672, kv=1024, vocabulary=128256)


@dataclass(frozen=True)
class Need:
    """Bytes per GPU, without activations."""

    base: float
    adapter: float
    """With its gradient and two moments."""
    gathered: float
    """Blocks that are whole while they run, the next one being fetched meanwhile."""
    root: float
    adapter_sent: float
    """Sent in a step for the adapter alone."""
    base_sent: float
    """Sent in a step for the frozen base."""

    @property
    def held(self) -> float:
        """The sum."""
        return self.base + self.adapter + self.gathered + self.root


def ddp(shape: Shape, rank: int, gpus: int, base_bytes: float = 2.0) -> Need:
    """Every GPU holds everything, and the adapter's gradients are averaged.

    Args:
        shape: the base.
        rank: of the LoRA, at every linear layer, held in float32.
        gpus: how many.
        base_bytes: bytes a parameter of the base takes: 2 in bfloat16, about 0.52 in NF4 with its constants.
    """
    own = 4.0 * shape.adapter(rank)
    return Need(base_bytes * shape.parameters, 4 * own, 0.0, 0.0, 2 * own * (gpus - 1) / gpus, 0.0)


def fsdp2(shape: Shape, rank: int, gpus: int, base_bytes: float = 2.0) -> Need:
    """Each GPU holds a part; two blocks and the root group are whole on it while they run.

    The base is gathered twice a step (forward, backward), its root group once; the adapter twice, and its gradient is
    reduced and scattered.
    """
    own, share = 4.0 * shape.adapter(rank), (gpus - 1) / gpus
    block = base_bytes * shape.block + own / shape.layers
    gathered = base_bytes * (2 * shape.layers * shape.block + shape.root)
    return Need(
        base_bytes * shape.parameters / gpus, 4 * own / gpus, 2 * block, base_bytes * shape.root,
        3 * own * share, gathered * share,
    )  # fmt: skip


def table(shape: Shape = LLAMA_70B, rank: int = 16, gpus: tuple[int, ...] = (8, 64, 512)) -> list[str]:
    """The rows of the table in docs/scale.md, in GB of 1e9 bytes."""
    rows = {
        "base held, FSDP2": lambda n: fsdp2(shape, rank, n).base,
        "adapter, gradient and AdamW held, FSDP2": lambda n: fsdp2(shape, rank, n).adapter,
        "two blocks whole": lambda n: fsdp2(shape, rank, n).gathered,
        "root group whole": lambda n: fsdp2(shape, rank, n).root,
        "**held in all, FSDP2**": lambda n: fsdp2(shape, rank, n).held,
        "held in all, DDP": lambda n: ddp(shape, rank, n).held,
        "held in all, DDP over NF4": lambda n: ddp(shape, rank, n, 0.52).held,
        "sent a step for the adapter, DDP": lambda n: ddp(shape, rank, n).adapter_sent,
        "sent a step for the adapter, FSDP2": lambda n: fsdp2(shape, rank, n).adapter_sent,
        "sent a step for the base, FSDP2": lambda n: fsdp2(shape, rank, n).base_sent,
    }
    return [f"| {what} | " + " | ".join(f"{value(n) / 1e9:.2f}" for n in gpus) + " |" for what, value in rows.items()]
