"""Compile every kernel to machine code for two generations of GPUs, which needs none; started by test_choice.py."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectune.layers.kernels import banded, low_rank

RANK = {"RANK": 16, "PRECISION": "ieee", "num_stages": 2}
HALF = ("x", "t", "u", "y", "a", "b", "grad", "bias")
FLOAT = ("R", "L", "core", "ratio", "values", "sums")
KERNELS = [
    (low_rank._project, {"ROWS": 64, "COLUMNS": 64, "CORE": True, "x_k": 1, **RANK}),
    (low_rank._add, {"ROWS": 64, "COLUMNS": 128, "RATIO": True, "BIAS": True, "y_k": 1, **RANK, "num_warps": 8}),
    (low_rank._over_rows, {"ROWS": 64, "COLUMNS": 64, "a_k": 1, **RANK}),
    (low_rank._through_ratio, {"ROWS": 16, "COLUMNS": 128, "BIAS": True, "grad_k": 1}),
    (banded._product, {"ROWS": 16, "COLUMNS": 128, "TRANSPOSE": False, "t_k": 1}),
    (banded._product, {"ROWS": 16, "COLUMNS": 128, "TRANSPOSE": True, "t_k": 1}),
    (banded._entries, {"ROWS": 4, "COLUMNS": 64, "DIAGONALS": 16, "t_k": 1}),
]


def compile_one(kernel, constants, capability):
    names = kernel.arg_names
    options = {k: v for k, v in constants.items() if k not in names}
    constants = {k: v for k, v in constants.items() if k in names}
    kinds = dict.fromkeys(names, "i32")
    kinds |= dict.fromkeys(HALF, "*bf16") | dict.fromkeys(FLOAT, "*fp32") | {"out": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {n: kinds[n] for n in names}, {(names.index(k),): v for k, v in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


if __name__ == "__main__":
    for capability in (80, 90):
        for kernel, constants in KERNELS:
            compile_one(kernel, constants, capability)
        print(capability)
