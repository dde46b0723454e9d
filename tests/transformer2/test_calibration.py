"""Calibration: the temperature, and the threshold below which nothing is known."""

import pytest
import torch

from spectune.transformer2.calibration import best, calibrate, calibration_error


def test_temperature_undoes_a_scale_of_the_logits():
    logits = 2 * torch.randn(4000, 4)
    targets = torch.distributions.Categorical(logits=logits).sample()
    found = calibrate(5 * logits, targets, None)
    assert found.temperature == pytest.approx(5, rel=0.15)
    confidence, label = best(5 * logits / found.temperature, None)
    assert calibration_error(confidence, label == targets) < 0.03
    assert calibration_error(*_sure(5 * logits, targets)) > 0.1


def _sure(logits, targets):
    confidence, label = best(logits, None)
    return confidence, label == targets


def test_the_threshold_parts_strangers_from_the_known():
    known = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]).repeat(10, 1) + 0.1 * torch.randn(30, 3)
    targets = torch.arange(30) % 3
    found = calibrate(known, targets, None)  # with its own label taken away a prompt is torn between two
    confidence, _ = best(known / found.temperature, None)
    assert (confidence >= found.threshold).all()
    assert float(best(torch.zeros(1, 3) + 0.1, None)[0]) < found.threshold


def test_with_two_labels_the_threshold_keeps_most_of_what_is_right():
    logits = torch.randn(200, 2) * 3
    targets = logits.argmax(1)
    found = calibrate(logits, targets, None)
    confidence, _ = best(logits / found.temperature, None)
    assert 0.97 <= float((confidence >= found.threshold).float().mean()) < 1


def test_none_that_is_likelier_than_every_name_leaves_no_confidence():
    confidence, label = best(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]]), 2)
    assert confidence[0] == 0
    assert confidence[1] > 0.5
    assert label.tolist() == [0, 0]
