"""Multi-region discrete trust-region Bayesian optimisation (Eq. 11-20, App. C.3-C.4)."""

from __future__ import annotations

from typing import ClassVar, Literal, final

from qratk.refiners._trust_regions import TrustRegions
from qratk.refiners.base import refiners


@final
@refiners.register("trust_region")
class TrustRegion(TrustRegions):
    """One evaluation at a time at the highest rung: the pool member of largest expected improvement.

    Where the paper is silent: a radius that is not whole is rounded down when shrinking, up when growing; a tie goes
    to the smaller footprint; when no region's ball holds anything new, the radii grow until one does; a failed
    evaluation counts as the worst utility seen; references outside the budget or the ladders are neither centres nor
    the incumbent. A process that cannot be fitted is replaced by a random choice, and `fallbacks` says why.

    With `low_fidelity`, the `probes` pool members of largest expected improvement run to the lowest rung first. The
    process then has a term in the utility at that rung, fitted to the points measured at both (others are left out
    of it), and the best of the probed members runs on to the highest rung. With fewer than four such points the best
    utility at the lowest rung decides. When short runs disappoint (expected improvement below the threshold) while
    unprobed members still promise, there is another round of probes, at most `probe_rounds` a step. On a ladder of
    one rung the option does nothing. It is off by default: on six toy landscapes with four evaluations it was better
    on two, worse on three and equal on one.

    Args:
        regions: number of trust regions, J.
        diversity: least number of atomic edits between the first centres, Delta_div.
        radius, min_radius, max_radius: first, least and largest radius in atomic edits, delta.
        expand, shrink: factors of the radius after success and failure, kappa_up and kappa_down.
        max_evaluations: cap on evaluations at the highest rung, N_max.
        max_region_evaluations: cap on those of one region, N_max^TR.
        replace_exhausted: open a region elsewhere for one that has used up its evaluations.
        pool_size: configurations scored at most, over all regions; smaller balls are enumerated.
        min_expected_improvement: stop below it, epsilon_ei, in units of utility.
        ard: one length-scale a dimension instead of a single one (slower; no gain was found).
        kernel: "matern" is Eq. 13; "cocabo" sets bits apart from ranks, see `cocabo`.
        mix: share of the product of the two kernels against their sum, lambda; for "cocabo" only.
        low_fidelity: inform the choice by short runs.
        probes, probe_rounds: short runs a round, and rounds a step at most.
    """

    origin: ClassVar[str] = "trust_region"

    def __init__(
        self,
        regions: int = 3,
        diversity: int = 4,
        radius: int = 2,
        min_radius: int = 1,
        max_radius: int = 8,
        expand: float = 2.0,
        shrink: float = 0.5,
        max_evaluations: int = 15,
        max_region_evaluations: int = 5,
        replace_exhausted: bool = False,
        pool_size: int = 2000,
        min_expected_improvement: float = 1e-4,
        ard: bool = False,
        low_fidelity: bool = False,
        probes: int = 8,
        probe_rounds: int = 2,
        kernel: Literal["matern", "cocabo"] = "matern",
        mix: float = 0.5,
    ) -> None:
        super().__init__(
            regions=regions,
            diversity=diversity,
            radius=radius,
            min_radius=min_radius,
            max_radius=max_radius,
            expand=expand,
            shrink=shrink,
            max_evaluations=max_evaluations,
            max_region_evaluations=max_region_evaluations,
            replace_exhausted=replace_exhausted,
            pool_size=pool_size,
            min_expected_improvement=min_expected_improvement,
            ard=ard,
            low_fidelity=low_fidelity,
            probes=probes,
            probe_rounds=probe_rounds,
            kernel=kernel,
            mix=mix,
        )
