"""Adapters behind one base over HTTP, with another mixture in every row of one batch."""
