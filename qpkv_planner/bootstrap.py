"""The bootstrap that intervals come from: clusters are drawn, and the mean of what they hold is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_A_TIME = 1000  # resamples, for memory's sake


def cluster_means(sums: NDArray[Any], counts: NDArray[Any], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """float64 [num_resamples, ...]: means over as many clusters as there are, drawn with replacement. sums, counts: of
    each cluster's values, [clusters, ...]; what no drawn cluster has is NaN."""
    chance, means = np.random.default_rng(seed), []
    for start in range(0, num_resamples, AT_A_TIME):
        drawn = chance.integers(0, len(sums), (min(AT_A_TIME, num_resamples - start), len(sums)))
        with np.errstate(invalid="ignore"):
            means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)
