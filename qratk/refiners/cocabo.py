"""Trust regions with a kernel that sets bits apart from ranks (CoCaBO, Ru et al. 2020)."""

from __future__ import annotations

from typing import ClassVar, final

from qratk.refiners._trust_regions import TrustRegions
from qratk.refiners.base import refiners


@final
@refiners.register("cocabo")
class CoCaBO(TrustRegions):
    """`trust_region` whose process takes bits as categories and ranks as ordinal.

    The kernel is (1 - mix) (k_bits + k_ranks) + mix k_bits k_ranks, with the share of layers whose bits agree and a
    Matérn-5/2 of the ranks (Ru et al. 2020, Eq. 2 and 3). Their bandits over categories are left out: the pool holds
    both knobs. For the options that are not listed here, use `trust_region` with `kernel: cocabo`.

    Args:
        mix: share of the product of the two kernels against their sum, lambda.
        regions, diversity: number of trust regions, and least atomic edits between the first centres.
        radius, min_radius, max_radius: first, least and largest radius in atomic edits.
        max_evaluations, max_region_evaluations: caps on evaluations at the highest rung, in all and of one region.
        pool_size: configurations scored at most, over all regions.
        min_expected_improvement: stop below it, in units of utility.
    """

    origin: ClassVar[str] = "cocabo"

    def __init__(
        self,
        mix: float = 0.5,
        regions: int = 3,
        diversity: int = 4,
        radius: int = 2,
        min_radius: int = 1,
        max_radius: int = 8,
        max_evaluations: int = 15,
        max_region_evaluations: int = 5,
        pool_size: int = 2000,
        min_expected_improvement: float = 1e-4,
    ) -> None:
        super().__init__(
            regions=regions,
            diversity=diversity,
            radius=radius,
            min_radius=min_radius,
            max_radius=max_radius,
            max_evaluations=max_evaluations,
            max_region_evaluations=max_region_evaluations,
            pool_size=pool_size,
            min_expected_improvement=min_expected_improvement,
            kernel="cocabo",
            mix=mix,
        )
