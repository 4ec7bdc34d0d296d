"""The Triton kernels on a machine without a GPU: right in the interpreter, accepted by the compiler, not imported.

The interpreter has to be chosen before triton is imported, and the compiler must not find it chosen: each its process.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="triton is made for Linux")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS.parent, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@on_linux
def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    print(run(*options, "tests/gpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))


@on_linux
def test_kernels_compile_for_gpus_of_two_generations(tmp_path) -> None:
    print(run(str(TESTS / "gpu" / "compiles.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET=""))


def test_nothing_imports_triton_where_there_is_no_gpu() -> None:
    run(
        "-c",
        "import sys, torch\n"
        "from veneer.core.nf4_linear import Nf4Linear\n"
        "from veneer.ops.lowrank import LowRank, fused_linear\n"
        "x = torch.ones(2, 8, requires_grad=True)\n"
        "low = LowRank(torch.ones(2, 8, requires_grad=True), torch.ones(4, 2), 1.0, 0.5)\n"
        "(fused_linear(x, torch.ones(4, 8), None, low).sum() + Nf4Linear.of(torch.ones(4, 8))(x).sum()).backward()\n"
        "assert 'triton' not in sys.modules and 'veneer.ops.triton' not in sys.modules\n",
    )
