"""The methods: one file each, registered by name."""

from spectune.methods.base import Method
from spectune.methods.registry import METHODS, find, from_fields, load_all, parse, to_text

load_all()

__all__ = ["METHODS", "Method", "find", "from_fields", "parse", "to_text"]
