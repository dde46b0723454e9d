"""Adapters on a whole model: adapt, attach, activate, route, fused, extract, merge and detach."""

from spectune.model.adapting import adapt, attach, trainable
from spectune.model.fusing import fused
from spectune.model.lifecycle import detach, extract
from spectune.model.merging import merge, unmerge
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
    "fused",
    "merge",
    "route",
    "trainable",
    "unmerge",
]
