"""Metrics with their definitions; each one says what it is blind to.

`generation`: do generated cells look like real ones. `clustering`: do clusters
find the types. `rare`: do extra cells help to find a rare type.
"""

from __future__ import annotations

from scgenlib.metrics.clustering import (
    ari,
    ari_over_resolutions,
    feature_selection_utility,
    informative_genes,
    leiden,
    macro_f1,
    matched_labels,
    nmi,
)
from scgenlib.metrics.generation import (
    gene_correlation,
    gene_moments,
    memorisation,
    mmd2,
    moment_agreement,
    prdc,
    reference_split,
    sliced_wasserstein,
    two_sample_auroc,
    wasserstein,
)
from scgenlib.metrics.rare import calibration, cut_type, rare_arms, rare_utility

__all__ = [
    "ari",
    "ari_over_resolutions",
    "calibration",
    "cut_type",
    "feature_selection_utility",
    "gene_correlation",
    "gene_moments",
    "informative_genes",
    "leiden",
    "macro_f1",
    "matched_labels",
    "memorisation",
    "mmd2",
    "moment_agreement",
    "nmi",
    "prdc",
    "rare_arms",
    "rare_utility",
    "reference_split",
    "sliced_wasserstein",
    "two_sample_auroc",
    "wasserstein",
]
