"""What every method inherits from its declaration, and the sentences for values that do not fit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from methods.starts import start_of, to_double, weight
from spectune import SVF, DoRA, LoRA, PiSSA
from spectune.errors import SpectuneError
from spectune.layers.cores import Dense
from spectune.layers.factors import Factors
from spectune.methods.base import Method, at_most, check_bool, check_choice, check_int, check_range


@dataclass(frozen=True)
class Plain(Method):
    """dW = s L C R of three trained matrices, and nothing else said."""

    name: ClassVar[str] = "plain"
    rank: Any = 2
    alpha: Any = 3.0
    dropout: Any = 0.0
    flag: Any = True
    mode: Any = "one"

    def shapes(self, out_features, in_features):
        return {"L": (out_features, self.rank), "C": (self.rank, self.rank), "R": (self.rank, in_features)}

    def initial(self, shapes, basis):
        return {name: torch.ones(shape) for name, shape in shapes.items()}

    def factors(self, t):
        return Factors(t["L"], t["R"], Dense(t["C"]), self.alpha)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in Plain().shapes(5, 4).items()}


def test_answers_follow_from_the_factors(tensors):
    method, x = Plain(), torch.randn(3, 4, dtype=torch.float64)
    dense = 3.0 * tensors["L"] @ tensors["C"] @ tensors["R"]
    torch.testing.assert_close(method.delta(tensors, torch.empty(0)), dense)
    base: Any = None  # which a plain sum does not ask
    torch.testing.assert_close(method.respond(tensors, x, base, True), x @ dense.mT)
    y = torch.ones(3, 5, dtype=torch.float64)
    method.add(tensors, x, y)
    torch.testing.assert_close(y, 1 + x @ dense.mT)


def test_an_input_is_dropped_in_training_alone(tensors):
    method, x = Plain(dropout=0.5), torch.ones(1, 4, dtype=torch.float64)
    dense, base = method.delta(tensors, torch.empty(0)), None
    torch.testing.assert_close(method.respond(tensors, x, base, False), x @ dense.mT)
    answers = {tuple(method.respond(tensors, x, base, True)[0].tolist()) for _ in range(50)}
    kept = torch.cartesian_prod(
        *[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 4
    )  # each input is dropped, or doubled
    possible = kept @ dense.mT
    assert len(answers) > 1
    for answer in answers:
        assert torch.isclose(possible, torch.tensor(answer, dtype=torch.float64)).all(1).any()
    assert (method.drop, SVF().drop) == (0.5, 0.0)


def test_what_is_not_declared_is_nothing(tensors):
    method, base = Plain(), None
    assert (method.request(), method.basis(torch.eye(3), None), method.fit(3, 3)) == (None, {}, method)
    assert method.ratio(tensors, base) is method.ratios([tensors], [base]) is method.whole(tensors) is None
    assert method.projections(tensors) is method.coefficients(tensors) is method.bias_of(tensors, None) is None
    assert method.still(tensors) is tensors
    assert method.spectrum({"S": tensors["C"]}) is tensors["C"]
    assert method.from_coefficients(tensors) == (method, tensors)
    assert method.initial_of_table({"L": (2, 2)}, {})["L"].tolist() == [[1, 1], [1, 1]]
    method.start_schedule([])
    with pytest.raises(NotImplementedError):
        method.whole_layer(torch.eye(2), None)
    with pytest.raises(NotImplementedError):
        method.replacement(tensors, torch.eye(2), None)


def test_parameters_are_counted_and_fields_are_told():
    assert Plain(rank=3).parameter_count(5, 4) == 5 * 3 + 9 + 3 * 4
    assert Plain(rank=3).fields() == {
        "name": "plain", "rank": 3, "alpha": 3.0, "dropout": 0.0, "flag": True, "mode": "one"
    }  # fmt: skip
    assert DoRA(SVF()).fields()["inner"] == SVF().fields()


def test_frozen_tensors_are_named_by_what_they_depend_on():
    assert Plain().basis_key == "plain"

    class Keyed(Plain):
        basis_fields = ("rank", "alpha")

    assert Keyed(rank=3, alpha=0.5).basis_key == "plain-3-0_5"  # a dot would part the names of modules
    assert Keyed(dropout=0.5).basis_key == Keyed().basis_key != Keyed(rank=3).basis_key


def test_a_smaller_rank_keeps_the_scale():
    found = at_most(LoRA(rank=8, alpha=4), 2)
    assert (found.rank, found.alpha, found.scale) == (2, 1.0, LoRA(rank=8, alpha=4).scale)
    method = PiSSA(rank=8)
    assert (at_most(method, 8), at_most(method, 9)) == (method, method)
    assert at_most(Plain(rank=8, alpha=None), 2).alpha is None


def test_a_start_is_where_the_update_is_zero():
    W = weight(6, 4)
    for method in (LoRA(rank=2), PiSSA(rank=2), SVF()):
        frozen, trained = start_of(method, W)
        delta = method.delta({**frozen, **to_double(trained)}, W)
        torch.testing.assert_close(delta, torch.zeros(6, 4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda m: check_int(m, "rank"), 0, "rank of Plain must be an integer >= 1, not 0"),
        (lambda m: check_int(m, "rank", least=3), 2, "rank of Plain must be an integer >= 3, not 2"),
        (lambda m: check_int(m, "rank"), True, "rank of Plain must be an integer >= 1, not True"),
        (lambda m: check_int(m, "rank"), 2.0, "rank of Plain must be an integer >= 1, not 2.0"),
        (lambda m: check_range(m, "rank", 0, 1), 1, "rank of Plain must be a number in [0, 1), not 1"),
        (lambda m: check_range(m, "rank", 0, 1), -0.5, "rank of Plain must be a number in [0, 1), not -0.5"),
        (lambda m: check_range(m, "rank", 0, open_low=True), 0, "rank of Plain must be a number in (0, 1e+12), not 0"),
        (lambda m: check_range(m, "rank", 0), float("nan"), "rank of Plain must be a number in [0, 1e+12), not nan"),
        (lambda m: check_range(m, "rank", 0), True, "rank of Plain must be a number in [0, 1e+12), not True"),
        (lambda m: check_range(m, "rank", 0), "1", "rank of Plain must be a number in [0, 1e+12), not '1'"),
        (lambda m: check_bool(m, "flag", "rank"), 1, "rank of Plain must be true or false, not 1"),
        (lambda m: check_choice(m, "rank", ["a", "b"]), "c", "rank of Plain must be one of a, b, not 'c'"),
        (lambda m: check_choice(m, "rank", iter(["a", "b"])), [], "rank of Plain must be one of a, b, not []"),
    ],
)
def test_values_that_do_not_fit(check, value, message):
    with pytest.raises(SpectuneError) as refused:
        check(Plain(rank=value))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (lambda m: check_int(m, "rank", least=0), 0),
        (lambda m: check_range(m, "rank", 0, 1), 0),
        (lambda m: check_range(m, "rank", 0, 1, open_low=True), 0.999),
        (lambda m: check_bool(m, "rank"), False),
        (lambda m: check_choice(m, "rank", iter("ab")), "b"),
    ],
)
def test_values_that_do(check, value):
    check(Plain(rank=value))
