"""Set scgenlib's integration metrics beside those of scib-metrics, once.

scib-metrics brings jax and wants its own environment, so this runs in three steps that
share one .npz file; only the second needs scib-metrics, and it needs no scgenlib:

    python experiments/scib_check.py embed runs/scib.npz --dataset pbmc_3batches
    other/bin/python experiments/scib_check.py score runs/scib.npz
    python experiments/scib_check.py record runs/scib.npz --dataset pbmc_3batches

`score` writes a .json beside the .npz. The record holds, for every embedding and
metric, 'ours' and 'theirs'.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

#: Our name -> theirs, in `scib_metrics`. Neighbours of theirs are 90, 50 and 15.
PAIRS = {
    "nmi_kmeans": "nmi_ari_cluster_labels_kmeans:nmi",
    "ari_kmeans": "nmi_ari_cluster_labels_kmeans:ari",
    "nmi_leiden": "nmi_ari_cluster_labels_leiden:nmi",
    "ari_leiden": "nmi_ari_cluster_labels_leiden:ari",
    "silhouette_label": "silhouette_label",
    "isolated_labels": "isolated_labels",
    "clisi": "clisi_knn",
    "bras": "bras",
    "silhouette_batch": "silhouette_batch",
    "ilisi": "ilisi_knn",
    "kbet": "kbet_per_label",
    "graph_connectivity": "graph_connectivity",
    "pcr_comparison": "pcr_comparison",
    "bio": "mean",
    "batch": "mean",
    "total": "0.6 bio + 0.4 batch",
}


def embed(args: argparse.Namespace) -> None:
    """Write embeddings, labels and batches, as numbers and plain strings."""
    from scgenlib import datasets, integrators

    adata = datasets.load(args.dataset, verbose=False)
    arms = {"pca": integrators.pca, "harmony": integrators.harmony}
    codes = {}
    for name, integrate in arms.items():
        codes[name] = integrate(adata, n_pcs=args.n_pcs, n_genes=args.n_genes).X
    labels, batches = (adata.obs[c].astype(str).to_numpy("U") for c in args.columns)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.file, labels=labels, batches=batches, **codes)
    print(args.file, adata.shape, {name: Z.shape for name, Z in codes.items()})


def score(args: argparse.Namespace) -> None:
    """Compute what scib-metrics says; the before of PCR is the embedding 'pca'."""
    warnings.simplefilter("ignore")
    import scib_metrics as scib
    from scib_metrics.nearest_neighbors import pynndescent

    found: dict[str, Any] = {}
    with np.load(args.file) as file:
        data = dict(file)
    t, b = data.pop("labels"), data.pop("batches")
    for name, Z in data.items():
        near = pynndescent(Z, n_neighbors=90, random_state=0)
        few = near.subset_neighbors(n=15)
        call = {
            "nmi_ari_cluster_labels_kmeans": (Z, t),
            "nmi_ari_cluster_labels_leiden": (few, t),
            "silhouette_label": (Z, t),
            "isolated_labels": (Z, t, b),
            "clisi_knn": (near, t),
            "bras": (Z, t, b),
            "silhouette_batch": (Z, t, b),
            "ilisi_knn": (near, b),
            "kbet_per_label": (near.subset_neighbors(n=50), b, t),
            "graph_connectivity": (few, t),
        }
        scores: dict[str, float] = {}
        for metric, given in call.items():
            value = getattr(scib, metric)(*given)
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in parts:
                scores[f"{metric}:{part}".rstrip(":")] = float(number)
        before = data["pca"]
        compared = scib.pcr_comparison(before, Z, b, categorical=True)
        scores["pcr_comparison"] = float(compared)
        found[name] = scores
    names = ("scib-metrics", "jax", "pynndescent", "umap-learn", "igraph", "numpy")
    about = {name: importlib.metadata.version(name) for name in names}
    text = json.dumps({"scores": found, "versions": about}, indent=1)
    args.file.with_suffix(".json").write_text(text + "\n")


def record(args: argparse.Namespace) -> None:
    """Compute ours and write both into the record."""
    from scgenlib import datasets, records
    from scgenlib.estimator import data_hash
    from scgenlib.metrics import integration

    started = time.monotonic()
    theirs = json.loads(args.file.with_suffix(".json").read_text())
    with np.load(args.file) as file:
        data = dict(file)
    t, b = data.pop("labels"), data.pop("batches")
    rows = []
    for name, Z in data.items():
        ours = integration.integration_scores(Z, t, b, data["pca"], max_cells=None)
        other = dict(theirs["scores"][name])
        # Their mean over our list: the isolated labels go where ours are nan.
        for part in ("bio", "batch"):
            used = [other[PAIRS[metric]] for metric in ours[f"{part}_metrics"]]
            other[part] = float(np.mean(used))
        other["total"] = 0.6 * other["bio"] + 0.4 * other["batch"]
        for metric, key in PAIRS.items():
            their = other[key] if key in other else other[metric]
            row = {"embedding": name, "metric": metric, "ours": ours[metric]}
            rows.append({**row, "theirs": their})
    adata = datasets.load(args.dataset, verbose=False)
    path = records.record_path("scatlasvae", args.dataset, "scib", args.results_dir)
    records.write_record(
        path,
        rows,
        {"n_pcs": args.n_pcs, "n_genes": args.n_genes, "columns": args.columns},
        device="cpu",
        seconds=time.monotonic() - started,
        data_hash=data_hash(adata),
        modules=["metrics.integration", "integrators"],
        n_cells=adata.n_obs,
        n_genes=adata.n_vars,
        theirs=theirs["versions"],
    )
    for row in rows:
        print("{embedding:8} {metric:20} {ours:.4f} {theirs:.4f}".format(**row))


def main(argv: list[str]) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = {"embed": embed, "score": score, "record": record}
    parser.add_argument("step", choices=list(steps))
    parser.add_argument("file", type=Path)
    parser.add_argument("--dataset", default="pbmc_3batches")
    parser.add_argument("--n-pcs", type=int, default=30)
    parser.add_argument("--n-genes", type=int, default=None)
    parser.add_argument("--columns", nargs=2, default=["cell_type", "batch"])
    parser.add_argument("--results-dir", type=Path, default=None)
    args = parser.parse_args(argv)
    steps[args.step](args)


if __name__ == "__main__":
    main(sys.argv[1:])
