"""Hold generated cells against held-out real ones while a model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anndata import AnnData

from scgenlib import training
from scgenlib._matrix import subsample
from scgenlib.errors import unknown

__all__ = ["validate"]


def validate(
    valid: AnnData,
    every: int | None = None,
    *,
    n_cells: int = 500,
    keep: str | None = None,
    folder: str | Path | None = None,
) -> training.Callback:
    """Return a callback that holds generated cells against held-out ones.

    It adds the terms valid_mmd and valid_auroc to the history.

    Parameters
    ----------
    valid
        Real cells that the training does not see.
    every
        Steps between two looks; the configuration's `validation_freq` by default.
    n_cells
        Cells that are compared, on either side.
    keep
        ``"mmd"`` or ``"auroc"``: the fit ends with the generator of the look at
        which this was lowest, and not with the last.
    folder
        Where to write a map of real and generated cells at every look.
    """
    from scgenlib.metrics import mmd2, two_sample_auroc

    if keep not in (None, "mmd", "auroc"):
        raise unknown("measure to keep the best of", keep, ["mmd", "auroc"])
    made: dict[str, Any] = {}

    def look(event: training.Event) -> None:
        model: Any = event.model
        # The same callback may serve another fit, with other genes.
        if made.get("data") != model.data_hash_ or made["genes"] != model.genes_:
            made.clear()
            made.update(data=model.data_hash_, genes=model.genes_)
            made["real"] = model.align(subsample(valid, n_cells, 0))
        real = made["real"]
        fake = model.generate(model.like(real), seed=model.seed, report=False)
        terms = {
            "valid_mmd": mmd2(real, fake),
            "valid_auroc": two_sample_auroc(real, fake, n_pcs=20, n_trees=100, folds=3),
        }
        event.history.append(event.step, event.phase, terms)
        if keep is not None:
            model.keep_if_best(event.step, terms[f"valid_{keep}"])
        if folder is not None:
            _picture(real, fake, made, Path(folder) / f"step_{event.step}.png")

    def call(event: training.Event) -> bool | None:
        config: Any = event.model.config
        gap = every or config.validation_freq
        return training.every(gap, look, phase="gan")(event)

    return call


def _picture(real: AnnData, fake: AnnData, made: dict[str, Any], path: Path) -> None:
    """Write one map of real and generated cells; the map is fitted once, on real."""
    import matplotlib.pyplot as plt

    from scgenlib import plots

    key = next((name for name in fake.obs if name in real.obs), None)
    for cells, name in ((real, "real"), (fake, "generated")):
        cells.obs["shown"] = name if key is None else cells.obs[key].astype(str)
    if "map" not in made:
        made["map"] = plots.fit_map(real)
        made["styles"] = plots.palette([*real.obs["shown"], *fake.obs["shown"]])
    look = {"place": made["map"], "styles": made["styles"], "label_key": "shown"}
    figure = plots.embedding(real, {"generated": fake}, **look)[0].figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
