"""Adapters on a whole model: adapt, attach, activate, route, extract, merge and detach."""

from spectune.model.adapting import adapt, attach
from spectune.model.lifecycle import detach, extract, merge
from spectune.model.names import adapter_names
from spectune.model.routing import Reference, activate, base_alone, route

__all__ = [
    "Reference",
    "activate",
    "adapt",
    "adapter_names",
    "attach",
    "base_alone",
    "detach",
    "extract",
    "merge",
    "route",
]
