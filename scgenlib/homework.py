"""Homework with simulated cells of one's own.

Each student gets other cells with another answer. Both follow from the student's id,
the chapter and a secret of the course, so that nothing has to be stored and a teacher
can work the answer out again. This is no lock: whoever knows the secret and reads this
file can do the same. It makes copying from a neighbour useless, not cheating
impossible. A teacher who wants more keeps the secret, and hands out only files that
`save` wrote.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scgenlib.errors import ConfigError, message, unknown
from scgenlib.files import atomic

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CHAPTERS", "Homework", "Task", "homework"]


@dataclass(frozen=True)
class Task:
    """One question of a homework.

    Parameters
    ----------
    text
        The question, and the form of the answer.
    kind
        "number", "name" (one word) or "names" (a list of words).
    tolerance
        "number": the largest distance from the truth. "names": the smallest F1 score,
        0 to 1, against the true names.
    """

    text: str
    kind: str
    tolerance: float = 0.0

    def is_right(self, found: Any, truth: Any) -> bool:
        """Return whether the answer `found` is near enough to `truth`."""
        try:
            if self.kind == "number":
                return bool(abs(float(found) - truth) <= self.tolerance)
            if self.kind == "name":
                return bool(str(found).strip() == truth)
            given, right = {str(name) for name in found}, set(truth)
            f1 = 2 * len(given & right) / max(1, len(given) + len(right))
            return f1 >= self.tolerance
        except (TypeError, ValueError):
            return False


@dataclass(frozen=True)
class Homework:
    """Cells of one student, and what to find out about them.

    Attributes
    ----------
    student_id, chapter
        Whose homework it is, and to which chapter it belongs.
    adata
        The cells, without anything that gives the answer.
    tasks
        The questions by key. An answer is a dictionary with the same keys.
    """

    student_id: str
    chapter: str
    adata: AnnData
    tasks: Mapping[str, Task]
    secret: str = field(default="", repr=False)

    @property
    def text(self) -> str:
        """The questions, as a student reads them."""
        lines = [f"Homework of {self.student_id}, chapter {self.chapter}"]
        columns = ", ".join(f"adata.obs[{name!r}]" for name in self.adata.obs)
        lines.append(
            f"Cells: {self.file}.h5ad, or `adata` of this homework; with {columns}"
            if columns
            else f"Cells: {self.file}.h5ad, or `adata` of this homework"
        )
        lines += [f"{key}: {task.text}" for key, task in self.tasks.items()]
        return "\n".join([*lines, f"Hand in a dictionary: {dict.fromkeys(self.tasks)}"])

    def answer(self) -> dict[str, Any]:
        """Return the true answers, worked out again from id and secret."""
        return _make(self.student_id, self.chapter, self.secret)[2]

    def grade(self, answers: Mapping[str, Any]) -> pd.DataFrame:
        """Compare `answers` with the truth.

        Parameters
        ----------
        answers
            Answers by key of `tasks`. A missing one counts as wrong.

        Returns
        -------
        DataFrame
            A row for each task: `found`, `right` (bool).

        Raises
        ------
        ConfigError
            If a key is no task.
        """
        for key in answers:
            if key not in self.tasks:
                raise unknown("task", key, self.tasks)
        truth = self.answer()
        rows = {
            key: {
                "found": answers.get(key),
                "right": task.is_right(answers.get(key), truth[key]),
            }
            for key, task in self.tasks.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def file(self) -> str:
        """Name of the files that `save` writes, without an ending."""
        # An id may be any text, and a name of a file may not.
        name = re.sub(r"[^\w.@-]", "_", self.student_id)
        if name != self.student_id:
            name += "-" + hashlib.sha256(self.student_id.encode()).hexdigest()[:6]
        return f"{self.chapter}-{name}"

    def save(self, folder: str | Path) -> Path:
        """Write cells (.h5ad) and questions (.txt); return the path of the cells."""
        path = Path(folder) / f"{self.file}.h5ad"
        with atomic(path, "The homework cannot be written") as part:
            self.adata.write_h5ad(part)
        text = Path(folder) / f"{self.file}.txt"
        with atomic(text, "The homework cannot be written") as part:
            part.write_text(self.text + "\n", encoding="utf-8")
        return path


def homework(
    student_id: str, chapter: str | None = None, *, secret: str = ""
) -> Homework:
    """Return the homework of one student.

    Parameters
    ----------
    student_id
        Any text; the same text gives the same cells.
    chapter
        One of `CHAPTERS`. Left out: the one that the notebook has started.
    secret
        A word of the course. Another one changes all cells and all answers.

    Returns
    -------
    Homework

    Raises
    ------
    ConfigError
        Empty `student_id`, a chapter without homework, or no chapter at all.
    """
    if chapter is None:
        from scgenlib.chapter import STARTED

        # `chapter.start` leaves the name in the notebook, which is `__main__`.
        chapter = getattr(sys.modules["__main__"], STARTED, None)
    if chapter is None:
        raise ConfigError(
            message(
                "Homework belongs to a chapter, and none was started here",
                allowed=f"one of {', '.join(CHAPTERS)}",
                do="Name one: chapter.homework(student_id, 'garage').",
            )
        )
    adata, tasks, _ = _make(student_id, chapter, secret)
    return Homework(student_id, chapter, adata, tasks, secret)


_Made = tuple["AnnData", dict[str, Task], dict[str, Any]]


def _make(student_id: str, chapter: str, secret: str) -> _Made:
    if not student_id.strip():
        raise ConfigError(
            message("A homework needs a student", found=student_id, allowed="any text")
        )
    if chapter not in CHAPTERS:
        raise unknown("chapter with homework", chapter, CHAPTERS)
    text = f"{secret}\0{chapter}\0{student_id}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return CHAPTERS[chapter](np.random.default_rng(seed))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _bare(adata: AnnData, rng: np.random.Generator, *columns: str) -> AnnData:
    """Return counts with the columns of obs that a student may see, cells mixed."""
    import anndata as ad

    from scgenlib.preprocess import normalise

    order = rng.permutation(adata.n_obs)
    counts = adata.layers["counts"][order]
    obs = adata.obs[[*columns]].iloc[order].reset_index(drop=True)
    obs.index = pd.Index([f"cell{i + 1:05d}" for i in range(adata.n_obs)])
    for name in columns:  # unused categories would tell
        obs[name] = pd.Categorical(obs[name].astype(str))
    var = pd.DataFrame(index=[f"gene{i + 1:04d}" for i in range(adata.n_vars)])
    cells = ad.AnnData(normalise(counts, 1e4), obs=obs, var=var)
    cells.layers["counts"] = counts
    adata.uns["order"] = order
    return cells


def _data(rng: np.random.Generator) -> _Made:
    """Negative binomial genes; one has no excess variance, one has added zeros."""
    import anndata as ad
    from scipy import sparse

    n, m = 1500, 200
    depth = np.exp(rng.normal(0, 0.4, n))
    mean, theta = np.exp(rng.uniform(0.7, 2.1, m)), rng.uniform(1.0, 4.0, m)
    plain, hollow, asked = rng.choice(m, 3, replace=False)
    mean[[plain, hollow, asked]], theta[hollow] = rng.uniform(5, 8, 3), 4.0
    mu = np.outer(depth / depth.mean(), mean)
    counts = rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32)
    counts[:, plain] = rng.poisson(mu[:, plain])
    counts[rng.random(n) < rng.uniform(0.25, 0.35), hollow] = 0
    full = ad.AnnData(layers={"counts": sparse.csr_matrix(counts)}, shape=(n, m))
    cells = _bare(full, rng)
    names = cells.var_names
    one = "All cells are of one type, and a cell's expected counts follow its depth."
    tasks = {
        "poisson": Task(f"{one} Which gene varies as Poisson counts do? A name of"
                        " adata.var_names.", "name"),
        "zeros": Task("Which gene has more zeros than a negative binomial of its mean"
                      " and variance? A name of adata.var_names.", "name"),
        "theta": Task("A negative binomial count with mean m has variance m + m²/θ."
                      f" What is θ of {names[asked]}? A number.", "number",
                      0.25 * theta[asked]),
    }  # fmt: skip
    truth = {"poisson": names[plain], "zeros": names[hollow]}
    return cells, tasks, truth | {"theta": float(theta[asked])}


def _evaluation(rng: np.random.Generator) -> _Made:
    """Labelled cells, and four clusterings of them under names that say nothing."""
    from scgenlib import metrics
    from scgenlib.simulate import simulate

    full = simulate(1200, 200, depth_mean=3000, seed=_seed(rng))
    types = full.obs["cell_type"].astype(str)
    kinds = types.value_counts().index
    half = rng.random(full.n_obs) < rng.uniform(0.3, 0.5)
    made = {
        "renamed": types,
        "split": types.where((types != kinds[rng.integers(2)]) | half, "half"),
        "merged": types.replace(dict.fromkeys(kinds[:2], "both")),
        "noisy": types.where(rng.random(len(types)) < rng.uniform(0.5, 0.8),
                             rng.permutation(types)),
    }  # fmt: skip
    letters = dict(zip(made, rng.permutation([*"WXYZ"]).tolist(), strict=True))
    for key, labels in made.items():
        names = {
            name: f"c{i}" for i, name in enumerate(rng.permutation(labels.unique()))
        }
        full.obs[letters[key]] = labels.map(names)
    cells = _bare(full, rng, "cell_type", *"WXYZ")
    noisy = letters["noisy"]
    ask = "A letter, W, X, Y or Z (a column of adata.obs)."
    tasks = {
        "renamed": Task(f"Which clustering is the cell types under other names? {ask}",
                        "name"),
        "split": Task(f"Which clustering splits one type and keeps the others? {ask}",
                      "name"),
        "merged": Task(f"Which clustering puts two types into one cluster? {ask}",
                       "name"),
        "ari": Task(f"What is the adjusted Rand index of {noisy} against cell_type?"
                    " A number.", "number", 0.005),
    }  # fmt: skip
    ari = metrics.ari(types, full.obs[noisy])
    return cells, tasks, {key: letters[key] for key in [*tasks][:3]} | {"ari": ari}


def _machines(rng: np.random.Generator) -> _Made:
    """Points of four far blobs, and three generators of such points."""
    import anndata as ad
    from scipy import sparse

    def draw(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blob = rng.choice(4, size=1000, p=shares)
        return rng.normal(corners[blob], 0.3), np.bincount(blob, minlength=4) / 1000

    corners = np.array([[-3, -3], [-3, 3], [3, -3], [3, 3]]) + rng.normal(
        0, 0.3, (4, 2)
    )
    usual = rng.dirichlet(np.full(4, 20.0))
    lost, tilted = usual.copy(), usual[rng.permutation(4)] * rng.uniform(0.3, 3, 4)
    lost[rng.integers(4)] = 0
    shares = {
        "fresh": usual,
        "lost": lost / lost.sum(),
        "tilted": tilted / tilted.sum(),
    }
    points = {name: draw(share) for name, share in {"real": usual, **shares}.items()}
    letters = dict(zip(shares, rng.permutation([*"XYZ"]).tolist(), strict=True))
    source = np.repeat(["real", *(letters[name] for name in shares)], 1000)
    order = rng.permutation(len(source))
    X = sparse.csr_matrix(np.concatenate([x for x, _ in points.values()])[order])
    names = [f"point{i + 1:04d}" for i in range(len(source))]
    obs = pd.DataFrame({"source": source[order]}, index=names)
    cells = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["x1", "x2"]))
    p, q = points["real"][1], points["tilted"][1]
    both = p + q
    loss = -sum(s @ np.log(np.where(s > 0, s / both, 1)) for s in (p, q))
    far = str(rng.choice([*shares]))
    sides = (np.sort(points[name][0][:, 0]) for name in ("real", far))
    tasks = {
        "lost": Task("Which generator has lost a blob of the real points? A letter, X,"
                     " Y or Z (adata.obs['source']).", "name"),
        "loss": Task("The best discriminator D between real points and"
                     f" {letters['tilted']} knows the share of each blob in both. What"
                     " is its loss, the mean of -ln D over real points plus the mean of"
                     " -ln(1 - D) over the others? A number (ln 4 if they were alike).",
                     "number", 0.02),
        "w1": Task(f"How far is {letters[far]} from the real points in x1, as"
                   " 1-Wasserstein distance? A number.", "number", 0.02),
    }  # fmt: skip
    w1 = float(np.abs(np.subtract(*sides)).mean())
    return cells, tasks, {"lost": letters["lost"], "loss": float(loss), "w1": w1}


def _garage(rng: np.random.Generator) -> _Made:
    """Cells without labels, a few of them of a rare type."""
    from scgenlib.simulate import simulate

    share = rng.uniform(0.015, 0.045)
    full = simulate(2000, 400, rare_fraction=share, depth_mean=3000, seed=_seed(rng))
    cells = _bare(full, rng)
    rare = (full.obs["cell_type"] == "rare").to_numpy()[full.uns["order"]]
    tasks = {
        "n_rare": Task("One type has fewer than 5 % of the cells. How many cells"
                       " has it? A number.", "number", 0.2 * rare.sum()),
        "rare_cells": Task("Which cells are these? A list of their names"
                           " (adata.obs_names).", "names", 0.8),
    }  # fmt: skip
    truth = {"n_rare": int(rare.sum()), "rare_cells": cells.obs_names[rare].tolist()}
    return cells, tasks, truth


def _scatlasvae(rng: np.random.Generator) -> _Made:
    """Batches that share their types, but for one type and one batch."""
    from scgenlib.simatlas import atlas

    names = ["P", "Q", "R", "S", "T", "U", "V"][: rng.integers(5, 8)]
    sizes = dict(zip(names, rng.uniform(8, 20, len(names)), strict=True))
    full = atlas(3000, 500, n_batches=4, lineages={"L": sizes}, hierarchy=0.0,
                 batch_strength=0.3, depth=2000.0, seed=_seed(rng))  # fmt: skip
    missing, batch = str(rng.choice(names)), f"batch{rng.integers(1, 5)}"
    gone = (full.obs["cell_type"] == missing) & (full.obs["batch"] == batch)
    full = full[~gone.to_numpy()].copy()
    cells = _bare(full, rng, "batch")
    tasks = {
        "n_types": Task("How many cell types are there over all batches? A number.",
                        "number"),
        "batch": Task("One type is missing in one batch. In which? A name of"
                      " adata.obs['batch'].", "name"),
    }  # fmt: skip
    return cells, tasks, {"n_types": len(names), "batch": batch}


def _cscgan(rng: np.random.Generator) -> _Made:
    """Real cells of a training set, and four sources that claim to be new cells."""
    import anndata as ad

    from scgenlib import baselines
    from scgenlib.simulate import simulate

    full = simulate(1600, 300, depth_mean=3000, programmes=1.0, seed=_seed(rng))
    train, fresh = full[:800], full[800:1200]
    made = {
        "fresh": fresh,
        "copies": baselines.jitter(train, 400, seed=_seed(rng)),
        "shuffled": baselines.shuffle_genes(train, 400, seed=_seed(rng)),
    }
    one = full.obs["cell_type"].value_counts().index[rng.integers(1, 4)]
    rest = full[1200:]
    made["lost"] = rest[(rest.obs["cell_type"] != one).to_numpy()]
    letters = dict(zip(made, rng.permutation([*"WXYZ"]).tolist(), strict=True))
    parts = {"training": train} | {letters[k]: v for k, v in made.items()}
    X = [ad.AnnData(part.X, var=pd.DataFrame(index=full.var_names))
         for part in parts.values()]  # fmt: skip
    cells = ad.concat(X, label="source", keys=[*parts], index_unique="-")
    cells = cells[rng.permutation(cells.n_obs)].copy()
    cells.obs_names = [f"cell{i + 1:05d}" for i in range(cells.n_obs)]
    ask = "A letter, W, X, Y or Z (adata.obs['source'])."
    tasks = {
        "copies": Task(f"Which source repeats training cells, with noise? {ask}",
                       "name"),
        "shuffled": Task(f"Which source has lost how genes vary together? {ask}",
                         "name"),
        "lost": Task(f"Which source lacks a cell type? {ask}", "name"),
    }  # fmt: skip
    return cells, tasks, {key: letters[key] for key in tasks}


def _scgacl(rng: np.random.Generator) -> _Made:
    """Labelled cells after dropout."""
    from scgenlib.simulate import simulate

    rate = rng.uniform(0.1, 0.4)
    full = simulate(1500, 300, depth_mean=6000, dropout=rate, seed=_seed(rng))
    cells = _bare(full, rng, "cell_type")
    tasks = {
        "dropout": Task("Dropout strikes each count with one probability, whatever its"
                        " value. Which? A number from 0 to 1.", "number", 0.04),
    }  # fmt: skip
    return cells, tasks, {"dropout": float(rate)}


def _regina(rng: np.random.Generator) -> _Made:
    """A screen in which some knock-outs do nothing."""
    from scgenlib.simperturb import screen

    null = int(rng.integers(2, 6))
    full = screen(4000, 300, n_targets=12, n_doubles=0, n_unmeasured=0,
                  share_null=null / 12, strength_spread=0.1, n_batches=1,
                  seed=_seed(rng))  # fmt: skip
    strength = full.uns["targets"]["strength"]
    effect = full.varm["effect"]
    works = strength.index[strength > 0]
    target = str(rng.choice(works))
    change = effect[target].drop(target)
    # The share of common genes is measured best: ask about one of those.
    mean = pd.Series(np.asarray(full.X.mean(0)).ravel(), full.var_names)
    common = mean.drop([target]).nlargest(100).index
    gene = str(change[common].abs().idxmax())
    cells = _bare(full, rng, "perturbation")
    cells.var_names = full.var_names
    tasks = {
        "n_without_effect": Task("How many of the 12 knock-outs change no gene but"
                                 " their target? A number.", "number", 1),
        "sign": Task(f"Does the knock-out of {target} raise or lower {gene}? 'raises'"
                     " or 'lowers'.", "name"),
    }  # fmt: skip
    sign = "raises" if change[gene] > 0 else "lowers"
    return cells, tasks, {"n_without_effect": null, "sign": sign}


#: The chapters with homework.
CHAPTERS: dict[str, Callable[[np.random.Generator], _Made]] = {
    "data": _data,
    "evaluation": _evaluation,
    "machines": _machines,
    "scatlasvae": _scatlasvae,
    "cscgan": _cscgan,
    "garage": _garage,
    "scgacl": _scgacl,
    "regina": _regina,
}
