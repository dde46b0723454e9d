import pytest
import torch

from spectune.spectral._eigh import eigh


def matrices():
    drawn = torch.randn(3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    yield drawn @ drawn.mT
    yield torch.ones(12, 12) * 120
    yield torch.zeros(5, 5)
    yield torch.eye(7).neg()


def check(A, values, vectors):
    whole = A.tril() + A.tril(-1).mT
    eps = torch.finfo(A.dtype).eps * 100
    assert torch.allclose(
        vectors @ torch.diag_embed(values) @ vectors.mT, whole, atol=eps * float(whole.abs().max() + 1)
    )
    assert torch.allclose(vectors.mT @ vectors, torch.eye(A.shape[-1]).to(A).expand_as(A), atol=eps)
    assert bool((values.diff() >= -eps * float(whole.abs().max() + 1)).all())


@pytest.mark.parametrize("how", ["nan", "raises"])
def test_a_lapack_that_breaks_down(how, monkeypatch):
    theirs, calls = torch.linalg.eigh, []

    def breaks(A):
        calls.append(A)
        if len(calls) % 2 == 0:
            return theirs(A)
        if how == "raises":
            raise torch.linalg.LinAlgError("failed to converge")
        values, vectors = theirs(A)
        vectors[..., 0] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", breaks)
    for A in matrices():
        check(A, *eigh(A.tril()))
    assert len(calls) == 2 * len(list(matrices()))


def test_as_it_is_elsewhere():
    for A in matrices():
        check(A, *eigh(A))
    drawn = next(matrices())
    assert all(torch.equal(a, b) for a, b in zip(eigh(drawn), torch.linalg.eigh(drawn), strict=True))


def test_what_has_no_vectors():
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(torch.full((4, 4), torch.nan))
