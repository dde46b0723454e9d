"""Singular values and vectors of one matrix or of a model's: full, from the top, from the bottom, one-sided."""

from __future__ import annotations

from spectune.spectral._many import decompose_many
from spectune.spectral._svd import Certificate, certificate, one_sided, svd
from spectune.spectral._types import SVD, OneSided, Request

__all__ = ["SVD", "Certificate", "OneSided", "Request", "certificate", "decompose_many", "one_sided", "svd"]
