"""The faults, one file for each thing that breaks. `load` puts them all into the catalogue."""

from __future__ import annotations

import importlib
import pkgutil


def load() -> None:
    """Import every file of this folder: each enters its faults into tests.faults.lab.fault.CATALOGUE."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
