"""REGINA: a step of each phase against its floor, and the prediction of cells.

Products of one step with B pairs of cells, S tokens, and two transformers E and Dec; a
layer has 4 products per token (queries, keys and values as one; the output; two of the
hidden layer). Those of the attention itself, S x S with an inner width of 64, are left
out.

===========  =========================================================================
phase 1      products
===========  =========================================================================
codes        forward through E and Dec, 2 B cells
consistency  forward through E once more, B decoded cells
back         weight and input gradients of E and Dec, 2 B cells: to the codes, not to
             the cells; of the second pass through E, B cells, to the decoded cells
===========  =========================================================================

===========  =========================================================================
phase 2      products
===========  =========================================================================
prompt       forward through E, 3 B cells: controls, perturbed, silenced
moves        4 passes of B codes through the transitions, forward and back
pairs        forward through Dec, weight and input gradients: 2 B codes, made ones and
             controls; B codes in the published form, which has no controls here
critic       forward and back to the codes, B; its own update, 2 B
===========  =========================================================================

The classifier's products, under 0.1 % of all, are left out. AdamW updates what is
trained in the phase; phase 1 clips a gradient's norm, which reads it once more and is
not in the floor. The last rows predict cells of one perturbation.

Run: python benchmarks/regina.py [--only step predict] [--genes 5060]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import _floor as floor
import numpy as np
import torch

from scgenlib import REGINA, REGINAConfig, training
from scgenlib.latentcycle import token_width
from scgenlib.nets import count_parameters
from scgenlib.simperturb import screen

BATCH = 64


def transformer(
    config: REGINAConfig, n_genes: int, n: int, *, back: str, decoder: bool
) -> list[floor.Product]:
    """Return the products of a transformer for n cells.

    back: "" for none, "weights" for gradients of the weights and what lies between,
    "input" for those of the input too.
    """
    s, d = config.n_tokens, config.d_model
    width = token_width(n_genes, s)
    chain = [(n * s, width, d)]
    layer = [(n * s, d, 3 * d), (n * s, d, d), (n * s, d, 4 * d), (n * s, 4 * d, d)]
    chain += layer * config.n_layers
    chain.append((n, s * d, config.z_dim))
    if decoder:
        chain = [(rows, b, a) for rows, a, b in [chain[-1], *chain[1:-1], chain[0]]]
    found = [(1, rows, a, b) for rows, a, b in chain]
    if back:
        found += [(1, a, rows, b) for rows, a, b in chain]
        inputs = chain if back == "input" else chain[1:]
        found += [(1, rows, b, a) for rows, a, b in inputs]
    return found


def phase_1(config: REGINAConfig, n_genes: int) -> list[floor.Product]:
    """Return the products of the first table."""
    b = config.batch_size
    again = transformer(config, n_genes, b, back="input", decoder=False)
    return [
        *transformer(config, n_genes, 2 * b, back="weights", decoder=False),
        *transformer(config, n_genes, 2 * b, back="input", decoder=True),
        *(again if config.w_cons else []),
    ]


def phase_2(config: REGINAConfig, n_genes: int) -> list[floor.Product]:
    """Return the products of the second table, with an update of the critic."""
    b, w, z = config.batch_size, config.transition_width, config.z_dim
    both = bool(config.output == "shift" or config.w_anchor)
    chain = [(b, z, w), (b, z, w), *[(b, w, w)] * 4, (b, w, z)]
    moves: list[floor.Product] = []
    for n, a, c in chain:
        moves += [(4, n, a, c), (4, a, n, c), (4, n, c, a)]
    seen = [2 * z, *config.critic_width, 1]
    return [
        *transformer(config, n_genes, 3 * b, back="", decoder=False),
        *transformer(config, n_genes, b * (1 + both), back="input", decoder=True),
        *moves,
        *floor.forward(b, seen),
        *floor.input_gradients(b, seen, first=True),
        *floor.forward(2 * b, seen),
        *floor.weight_gradients(2 * b, seen),
        *floor.input_gradients(2 * b, seen),
    ]


def step(phase: str, form: str, n_genes: int) -> str:
    """Time one step of a phase, with the drawing of its batch."""
    torch.set_num_threads(1)
    config = (
        REGINAConfig.published(max_epochs=1, phase_2_epochs=1)
        if form == "published"
        else REGINAConfig(max_epochs=1, phase_2_epochs=1)
    )
    cells = screen(400, n_genes)
    rows: list[str] = []

    def look(event: training.Event) -> bool:
        model: Any = event.model
        if event.phase != phase:
            # One step of the other phase will do.
            return True
        memory = floor.peak_memory()
        n = {name: count_parameters(net) for name, net in model.modules_.items()}
        first = phase == "autoencoder"
        trained = ("encoder", "decoder", "centres", "classifier")
        if not first:
            trained = ("fwd", "bwd", "decoder", "critic", "learned")
        one = model._autoencoder_step if first else model._transition_step
        # The critic learns in every fifth step; no epoch ends here.
        at = 1 if first else 5
        result = floor.measure(
            lambda: one(at),
            phase_1(config, n_genes) if first else phase_2(config, n_genes),
            sum(n[name] for name in trained),
        )
        name = f"{phase}, {form}, {n_genes:,} genes"
        rows.append(floor.row(name, result, BATCH, memory))
        return True

    REGINA(config, device="cpu").fit(cells, callbacks=[look])
    return rows[0]


def predict(n_cells: int, n_genes: int) -> None:
    """Time the prediction of one perturbation of many cells, published sizes."""
    torch.set_num_threads(1)
    cells = screen(400, n_genes)
    config = REGINAConfig(max_epochs=1, phase_2_epochs=1, valid_share=0.0)
    # Weights need not be good ones to be timed.
    model = REGINA(config, device="cpu").fit(cells, callbacks=[lambda event: True])
    target = next(gene for gene in cells.obs["perturbation"].unique() if gene != "ctrl")
    rows = np.resize(np.arange(cells.n_obs), n_cells)
    query = cells[rows].copy()
    query.obs_names_make_unique()
    begun = time.process_time()
    model.predict(query, target)
    spent = time.process_time() - begun
    print(f"predict, {n_genes:,} genes: {n_cells / spent:,.0f} cells/CPU-s")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = ["step", "predict"]
    parser.add_argument("--only", nargs="+", choices=jobs, default=jobs)
    parser.add_argument("--genes", type=int, default=5060)
    args = parser.parse_args()
    if "step" in args.only:
        floor.table(
            f"REGINA, one step, published sizes, batch {BATCH}",
            [
                (step, (phase, form, args.genes))
                for phase in ("autoencoder", "transition")
                for form in ("default", "published")
            ],
        )
    if "predict" in args.only:
        predict(1000, args.genes)


if __name__ == "__main__":
    main()
