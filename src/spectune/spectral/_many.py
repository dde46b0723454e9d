"""Many matrices at once."""
from spectune.spectral._svd import one_sided, svd


def decompose_many(weights, request, *, cache=True, progress=None, order=None):
    out = {}
    for i, (n, w) in enumerate(weights.items()):
        w = w() if callable(w) else w
        out[n] = one_sided(w) if request.kind == "one_sided" else svd(w, request.rank, request.kind, request.tol)
        if progress: progress(i + 1, len(weights))
    return out
