"""An adapted layer without its adapters: its own answer, and what an update may ask of it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Base
from spectune.layers.modules import effective_weight, stored_weight
from spectune.layers.packed import Packed, packed_product
from spectune.layers.parts import PartLinear
from spectune.layers.selection import Selection
from spectune.layers.shards import is_part
from spectune.layers.stored import Stored
from spectune.layers.updates import Basis, Update
from spectune.layers.values import Seen, WeightValues, is_made_of, row_norms
from spectune.private import is_transformed
from spectune.speed.dense import by_onednn, linear
from spectune.speed.laid_out import LaysOut
from spectune.speed.recompute_cache import frozen_linear


class FrozenLayer(LaysOut, Stored):
    """Mixed into a linear layer's class: what of it stays as it was, and the frozen tensors of its adapters."""

    adapters: nn.ModuleDict
    bases: nn.ModuleDict
    selection: Selection
    plain_class: type[nn.Module]
    is_transposed: bool  # W is held (in x out), as Conv1D does
    is_plain: bool  # W x + b is computed by nn.Linear or Conv1D and nothing else
    is_packed: bool  # and by the library that holds W packed
    is_own: bool = False  # within compiled code of its class's own forward method, which asks for the weight
    adapted_as: str
    bias: nn.Parameter | None
    weight_values: WeightValues  # what W was when it was last looked at

    def _plain(self, x: Tensor) -> Tensor:
        """Return the answer of the frozen layer."""
        if self.training and self.is_plain and by_onednn(x, effective_weight(self)) and self.fuses(x):
            return frozen_linear(x, effective_weight(self), self.bias)
        return self._own(x)

    def _own(self, x: Tensor) -> Tensor:
        """Return the answer of the layer's own class."""
        laid = self.laid
        if laid is not None and (y := laid.linear(x, self._parameters["weight"], self.bias)) is not None:
            return y
        if torch.compiler.is_compiling() and self.is_plain and self._parameters.get("weight") is not None:
            return F.linear(x, effective_weight(self), self.bias)
        if torch.compiler.is_compiling() and not self.is_packed:
            self.is_own = True  # as the code is traced, which knows no frames; no more than that is left of it
            y = super().forward(x)
            self.is_own = False
            return y
        if not self.is_packed or not x.requires_grad or not torch.is_grad_enabled():
            return super().forward(x)
        if torch.compiler.is_compiling() or is_transformed() or (self.bias is not None and self.bias.requires_grad):
            return super().forward(x)
        return packed_product(x, self, super().forward)

    @property
    def may_be_laid_out(self) -> bool:
        weight = self._parameters.get("weight")
        return self.is_plain and not self.is_transposed and weight is not None and not is_part(weight)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias of a plain matrix, without gradients."""
        laid = self.laid
        y = None if laid is None else laid.linear(x, self._parameters["weight"], bias)
        return F.linear(x, effective_weight(self), bias) if y is None else y

    def fuses(self, x: Tensor) -> bool:
        """Whether W is a plain frozen matrix in x's dtype, so that its product may be taken here."""
        own, bias = self._parameters.get("weight"), self.bias
        weight = effective_weight(self) if isinstance(self, PartLinear) else own
        return (
            self.is_plain
            and weight is not None
            and weight.dtype == x.dtype
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.compiler.is_compiling()
            and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
            and not is_transformed()
        )

    def base(self, output: Tensor | None = None) -> Base:
        """Return what an update may ask of the frozen layer whose output is `output`."""

        def without_bias(x: Tensor | None = None) -> Tensor:
            y = output if x is None else self._plain(x)
            if y is None:
                raise RuntimeError("this update was asked for outside a forward pass")
            return y if self.bias is None else y - self.bias.to(y.dtype)

        def project(R: Tensor) -> Tensor:
            weight = self._dense()
            return linear(weight, R.to(weight.dtype))

        def rows(index: Tensor) -> Tensor:
            return effective_weight(self).index_select(0, index)

        return Base(without_bias, project, self.bias, rows, self._norms, self._seen, self.owns)

    def _seen(self) -> tuple[Tensor, ...] | None:
        if self.is_packed:  # which nobody writes to
            return ()
        now = self._values_now()
        return None if now is None else (now.digest,)

    def _norms(self) -> Tensor:
        """Return ||W_i|| (out) of the W that is there now."""
        now = self._values_now()
        return row_norms(self._dense()) if now is None else now.norms

    def _dense(self) -> Tensor:
        """Return W (out x in), dequantized where it is packed."""
        weight = effective_weight(self)
        return weight.dense() if isinstance(weight, Packed) else weight

    def _values_now(self, *, once: bool = False) -> Seen | None:
        """Return what W is now; None where it is to be looked at each time, or nobody can have written to it."""
        if torch.compiler.is_compiling() or is_transformed() or self.is_packed:
            return None
        weight = effective_weight(self)
        return None if weight.is_meta or is_part(weight) else self.weight_values.of(weight, stored_weight(self), once)

    def owns(self, basis_key: str, *, once: bool = False) -> bool:
        """Whether frozen tensors of this name were made of the W that is there now.

        Args:
            basis_key: the name.
            once: this is not asked in each forward pass, so that W need not be watched for it.
        """
        basis = cast("Basis | None", self.bases._modules.get(basis_key))
        if basis is None or basis.made is None or (now := self._values_now(once=once)) is None:
            return True
        if basis.compared is None or basis.compared[0] is not now.digest:
            basis.compared = now.digest, is_made_of(basis.made, now, effective_weight(self))
        return basis.compared[1]

    def tensors(self, update: Update) -> dict[str, Tensor]:
        """Return an update's trained and frozen tensors by name."""
        basis = cast("Basis | None", self.bases._modules.get(update.basis_key))
        if update.unmade:
            real = not effective_weight(self).is_meta
            if (basis is None and update.needs_basis) or (real and any(p.is_meta for p in update.trained().values())):
                raise SpectuneError(
                    f"the weight of {self.adapted_as!r} was on the meta device when it was adapted, and the adapter "
                    "has no values: adapt the model when its weights are loaded"
                )
            update.unmade = not real
        return (
            update.trained()
            if basis is None
            else {
                **basis.tensors(),
                # of which a copy, as `trained` makes one, would cost as much as all else here
                **cast("dict[str, Tensor]", update._parameters or update.trained()),
            }
        )
