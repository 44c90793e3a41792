"""Deep generative methods for single-cell RNA-seq, one readable file each."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use, so that `import scgenlib` stays quick and light.
_EXPORTS = {
    "GARAGE": "garage",
    "GARAGEConfig": "garage",
    "CscGAN": "cscgan",
    "CscGANConfig": "cscgan",
    "REGINA": "regina",
    "REGINAConfig": "regina",
    "ScGAN": "cscgan",
    "ScGANConfig": "cscgan",
    "ScGACL": "scgacl",
    "ScGACLConfig": "scgacl",
    "ScAtlasVAE": "scatlasvae",
    "ScAtlasVAEConfig": "scatlasvae",
}
_MODULES = (
    "atlas",
    "baselines",
    "cells",
    "chapter",
    "completion",
    "conditions",
    "countvae",
    "cscgan",
    "datasets",
    "dropout",
    "errors",
    "estimator",
    "garage",
    "integrators",
    "latentcycle",
    "layouts",
    "likelihoods",
    "losses",
    "mapping",
    "metrics",
    "nets",
    "pairs",
    "perturbers",
    "plots",
    "preprocess",
    "published",
    "regina",
    "rowblocks",
    "scatlasvae",
    "scgacl",
    "simatlas",
    "simperturb",
    "simulate",
    "states",
    "surgery",
    "training",
    "vaegan",
    "wgan",
)

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"scgenlib.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"scgenlib.{name}")
    raise AttributeError(f"module 'scgenlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
