"""Rows of the methods whose change is given in a transformed domain."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL
from laws.table import Row
from veneer import C3AConfig, FourierFTConfig, WaveFTConfig

SOME = frozenset({"linear", "conv2d", "embedding", "experts"})

ROWS = [
    Row("fourierft", partial(FourierFTConfig, n_frequency=20, scaling=20.0), zero_start=False),
    Row("fourierft_zero", partial(FourierFTConfig, n_frequency=20, scaling=20.0, init_weights=True), tested=SOME),
    Row("waveft", partial(WaveFTConfig, n_frequency=20, scaling=2.0)),
    Row("waveft_db4", partial(WaveFTConfig, n_frequency=20, scaling=2.0, wavelet_family="db4"), tested=SOME),
    Row(
        "waveft_plain",
        partial(WaveFTConfig, n_frequency=20, scaling=2.0, use_idwt=False, proportional_parameters=True),
        tested=SOME,
    ),
    Row("c3a", partial(C3AConfig, block_size=2), zero_start=False),
    Row("c3a_zero", partial(C3AConfig, block_size=2, init_weights=True), tested=SOME),
    Row(
        "c3a_odd",
        partial(C3AConfig, block_size=8, init_weights=True),
        kinds=ALL - {"experts"},
        tested=SOME - {"experts"},
    ),
]
