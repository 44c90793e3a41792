"""Metrics with their definitions; each one says what it is blind to.

`generation`: do generated cells look like real ones. `clustering`: do clusters
find the types. `rare`: do extra cells help to find a rare type. `imputation`: are
filled values right, and what did filling invent.
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
from scgenlib.metrics.imputation import (
    cluster_scores,
    false_de,
    gene_correlation_inflation,
    invented_correlation,
    log_truth,
    mask_scores,
    masked_scores,
    mixing_error,
    neighbour_overlap,
    order_agreement,
    oversmoothing,
    poisson_loss,
    thin,
    zeros_filled,
)
from scgenlib.metrics.rare import calibration, cut_type, rare_arms, rare_utility

__all__ = [
    "ari",
    "ari_over_resolutions",
    "calibration",
    "cluster_scores",
    "cut_type",
    "false_de",
    "feature_selection_utility",
    "gene_correlation",
    "gene_correlation_inflation",
    "gene_moments",
    "informative_genes",
    "invented_correlation",
    "leiden",
    "log_truth",
    "macro_f1",
    "mask_scores",
    "masked_scores",
    "matched_labels",
    "memorisation",
    "mixing_error",
    "mmd2",
    "moment_agreement",
    "neighbour_overlap",
    "nmi",
    "order_agreement",
    "oversmoothing",
    "poisson_loss",
    "prdc",
    "rare_arms",
    "rare_utility",
    "reference_split",
    "sliced_wasserstein",
    "thin",
    "two_sample_auroc",
    "wasserstein",
    "zeros_filled",
]
