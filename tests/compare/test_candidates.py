"""What is compared: methods by a budget, and the baseline sized as they are."""

import pytest

from compare.tiny_bench import config
from spectune import SpectuneError
from spectune.compare.bench import Bench
from spectune.compare.candidates import baseline, candidates
from spectune.compare.trial import Trial


def test_a_budget_sets_ranks(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora", "svf"], budget="4k")
    bench = Bench(chosen)
    methods, notes = candidates(chosen, bench.model)
    assert methods[0].startswith("lora:rank=")
    assert methods[1] == "svf"
    assert bench.run(Trial(methods[0], 1e-2, 0, "search"))["trainable_parameters"] < 4000 + 200
    tight, notes = candidates(config(folder, tmp_path, methods=["svf"], budget="10"), bench.model)
    assert tight == ["svf"]
    assert "cannot be made as small as 10" in notes[0]


def test_the_baseline_is_sized_as_the_methods_are(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora:rank=16", "svf"], baseline="lora:rank=16", budget="4k")
    model = Bench(chosen).model
    methods, _ = candidates(chosen, model)
    assert methods[0] not in ("lora", "lora:rank=16")
    assert baseline(chosen, methods, model) == methods[0]
    other = config(folder, tmp_path, methods=["svf"], baseline="lora:rank=16")
    with pytest.raises(SpectuneError, match=r"baseline: lora:rank=16 is not among what is compared \(svf\)"):
        baseline(other, ["svf"], model)
    assert baseline(config(folder, tmp_path, methods=["svf"]), ["svf"], model) is None
