"""Has every kernel compiled as its own check launches it, for GPUs that need not be there; 1 if one fails."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veneer.ops.kernels import KERNELS

CAPABILITIES = (80, 90)
SHARED = 99 * 1024
"""Bytes of fast memory that a block may have on consumer cards."""
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


class Launches:
    """Stands in for a kernel, and takes note of how it is called."""

    def __init__(self, kernel: Any, calls: dict[str, tuple]):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*given: Any, **constants: Any) -> None:
            names = [name for name in self.kernel.arg_names if name not in constants]
            kinds = [TYPES[g.dtype] if isinstance(g, torch.Tensor) else "i32" for g in given]
            signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
            self.calls[f"{self.kernel.__name__} {signature} {constants}"] = (self.kernel, signature, constants)

        return launch


def calls(name: str, dtype: torch.dtype) -> dict[str, tuple]:
    """The launches of one module's check, each kind once."""
    module, found = importlib.import_module(f"veneer.ops.triton.{name}"), {}
    own = {n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction) and n.startswith("_")}
    vars(module).update({n: Launches(k, found) for n, k in own.items()})
    with contextlib.suppress(ArithmeticError):  # nothing was computed, so its answer means nothing
        module.check(torch.device("cpu"), dtype)
    vars(module).update(own)
    return found


def main(dtype: torch.dtype) -> int:
    failed = 0
    for name in KERNELS:
        for kernel, signature, constants in calls(name, dtype).values():
            for capability in CAPABILITIES:
                what = f"{name}.{kernel.__name__} sm_{capability}"
                try:
                    target = GPUTarget("cuda", capability, 32)
                    done = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target)
                    good = done.metadata.shared <= SHARED
                    print(f"{what}: {done.metadata.shared} bytes shared{'' if good else ', which is too much'}")
                except Exception as error:  # whatever the compiler raises
                    good = False
                    print(f"{what}: {type(error).__name__}: {error}")
                failed += not good
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "bfloat16")))
