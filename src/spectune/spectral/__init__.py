"""Singular values and vectors of one matrix or of a model's: full, from the top, from the bottom, one-sided."""

from __future__ import annotations

from spectune.spectral import cache
from spectune.spectral._certificate import Certificate, certificate
from spectune.spectral._many import decompose_each, decompose_many
from spectune.spectral._stream import Streamed, shards, stream, weight_map
from spectune.spectral._svd import one_sided, singular_values, svd
from spectune.spectral._types import SVD, OneSided, Request

__all__ = [
    "SVD",
    "Certificate",
    "OneSided",
    "Request",
    "Streamed",
    "cache",
    "certificate",
    "decompose_each",
    "decompose_many",
    "one_sided",
    "shards",
    "singular_values",
    "stream",
    "svd",
    "weight_map",
]
