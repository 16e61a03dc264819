"""K and V as operands: a model that attends by itself multiplies with the blocks in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..attention.products import times_keys, times_values
from .materialising import Materialising
from .step import LayerKV


class Multiplied(Materialising):
    """Knows the products that can do without a dense tensor."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        done = multiply_in_place(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs) if done is None else done

    def operand(self) -> Any:
        """An :class:`Operand`, or a tensor where the blocks cannot be read in place."""
        raise NotImplementedError


class Whole(Protocol):
    """What an :class:`Operand` needs of the handle it was made of."""

    source: LayerKV
    which: int

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def dense(self) -> torch.Tensor: ...


class Operand(Multiplied):
    """Keys or values on their way into a product that a model does by itself.

    Args:
        of: the handle.
        dtype: that they are cast to.
        flat: ``[B * Hkv, L, D]``, with all heads in one dimension.
        turned: the last two dimensions changed places.
    """

    def __init__(
        self, of: Whole, dtype: torch.dtype, flat: bool = False, turned: bool = False
    ) -> None:
        self.of = of
        self.dtype = dtype
        self.flat = flat
        self.turned = turned

    def operand(self) -> Operand:
        return self

    @property
    def shape(self) -> torch.Size:
        *batch, length, dim = self.of.shape
        if self.flat:
            batch = [batch[0] * batch[1]]
        return torch.Size((*batch, dim, length) if self.turned else (*batch, length, dim))

    @property
    def device(self) -> torch.device:
        return self.of.device

    @property
    def ndim(self) -> int:
        return 3 if self.flat else 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def transpose(self, dim0: int, dim1: int) -> Any:
        if {dim0 % self.ndim, dim1 % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return Operand(self.of, self.dtype, self.flat, not self.turned)
        return self.dense().transpose(dim0, dim1)

    def reshape(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        batch, heads, length, dim = self.of.shape
        folded = sizes in ((batch * heads, length, dim), (batch * heads, -1, dim))
        if folded and not (self.flat or self.turned):
            return Operand(self.of, self.dtype, True, False)
        return self.dense().reshape(sizes)

    view = reshape

    def contiguous(self) -> Operand:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            return Operand(self.of, args[0], self.flat, self.turned)
        return self.dense().to(*args, **kwargs)

    def product(self, left: Any) -> torch.Tensor | None:
        """``left @ self`` from the blocks in place; None where it takes a dense tensor."""
        source, which = self.of.source, self.of.which
        batch, heads, length, dim = self.of.shape
        if not isinstance(left, torch.Tensor) or left.dtype != self.dtype:
            return None
        if (left.requires_grad and torch.is_grad_enabled()) or self.turned != (which == 0):
            return None
        if self.flat:
            if left.ndim != 3 or left.shape[0] != batch * heads:
                return None
            left = left.unflatten(0, (batch, heads))
        spread = left.shape[1:3] if heads == 1 and left.ndim == 4 else None
        if spread is not None:  # one head for all queries
            left = left.flatten(1, 2)[:, None]
        if left.ndim != 4 or left.shape[:2] != (batch, heads):
            return None
        if left.shape[3] != (dim if which == 0 else length):
            return None
        where = left, source.storage, source.layer, source.step.plan
        out = times_values(*where) if which else times_keys(*where, length)
        if spread is not None:
            out = out[:, 0].unflatten(1, spread)
        return source.guard(out.flatten(0, 1) if self.flat else out)

    def dense(self) -> torch.Tensor:
        tensor = self.of.dense().to(self.dtype)
        if self.flat:
            tensor = tensor.reshape(-1, *tensor.shape[2:])
        return tensor.transpose(-1, -2) if self.turned else tensor

    def __repr__(self) -> str:
        return f"Operand({self.of!r}, shape={tuple(self.shape)})"


_PRODUCTS = (
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
)
_SUMS = (torch.baddbmm, torch.Tensor.baddbmm)


def multiply_in_place(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """The product that ``func`` stands for, if its right side can be read in place."""
    if func in _PRODUCTS and len(args) == 2 and not kwargs:
        return _product(*args)
    if func is torch.nn.functional.scaled_dot_product_attention:
        return _attend(*args, **kwargs)
    if func in _SUMS:
        named = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
        if isinstance(named.get("input"), torch.Tensor) and "out" not in named:
            product = _product(named.get("batch1"), named.get("batch2"))
            if product is not None:
                return named["input"] * named.get("beta", 1) + product * named.get("alpha", 1)
    return None


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """torch's attention for one query a row, ``[B, H, 1, D]``; None for any other."""
    if not isinstance(query, torch.Tensor) or query.ndim != 4 or query.shape[2] != 1:
        return None
    if is_causal or dropout_p or not (attn_mask is None or isinstance(attn_mask, torch.Tensor)):
        return None
    if not (isinstance(key, Multiplied) and isinstance(value, Multiplied)):
        return None
    keys = key.operand()
    if not isinstance(keys, Operand):
        return None
    scores = _product(query, keys.transpose(2, 3))
    if scores is None:
        return None
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scores.to(wide) * (query.shape[3] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _product(scores.softmax(-1).to(query.dtype), value)


def _product(left: Any, right: Any) -> torch.Tensor | None:
    operand = right.operand() if isinstance(right, Multiplied) else None
    return operand.product(left) if isinstance(operand, Operand) else None
