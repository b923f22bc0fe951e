"""Float32 weights in a narrower computation: read in its type, with gradients in float32.

By itself a gradient has the computation's type, and so have the sums of the chips' shares of it:
a compiler that multiplies matrices piece by piece rounds once for each chip.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def is_wider(weight: Array, dtype: Any) -> bool:
    """Whether a weight is float32, and a computation's type is not."""
    return weight.dtype == jnp.float32 and jnp.dtype(dtype).itemsize < 4


def product(x: Array, kernel: Array, reads: int) -> Array:
    """The last ``reads`` axes of x times a matrix, in x's type."""
    return (_narrow_product if is_wider(kernel, x.dtype) else _product)(x, kernel, reads)


def plus(y: Array, bias: Array) -> Array:
    """y with a bias, in y's type."""
    return _narrow_plus(y, bias) if is_wider(bias, y.dtype) else y + bias.astype(y.dtype)


def rows(table_VD: Array, index: Array, dtype: Any) -> Array:
    """Rows of a table, in a type."""
    return (_narrow_rows if is_wider(table_VD, dtype) else _rows)(table_VD, index, dtype)


def _product(x: Array, kernel: Array, reads: int) -> Array:
    axes = (tuple(range(x.ndim - reads, x.ndim)), tuple(range(reads)))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))


def _product_saving(x: Array, kernel: Array, reads: int):
    """The matrix is saved as it was read: chips that share it then gather it once for both."""
    kernel = kernel.astype(x.dtype)
    return _product(x, kernel, reads), (x, kernel)


def _product_gradients(reads: int, saved: tuple[Array, Array], y_grad: Array):
    x, kernel = saved
    outputs, batch = kernel.ndim - reads, tuple(range(x.ndim - reads))
    axes = tuple(range(y_grad.ndim - outputs, y_grad.ndim)), tuple(range(reads, kernel.ndim))
    x_grad = jax.lax.dot_general(y_grad, kernel, (axes, ((), ())))
    kernel_grad = jax.lax.dot_general(
        x, y_grad, ((batch, batch), ((), ())), preferred_element_type=jnp.float32
    )
    return x_grad, kernel_grad


def _plus(y: Array, bias: Array) -> Array:
    return y + bias.astype(y.dtype)


def _plus_gradients(bias: Array, y_grad: Array):
    batch = tuple(range(y_grad.ndim - bias.ndim))
    return y_grad, y_grad.astype(bias.dtype).sum(batch)


def _rows(table_VD: Array, index: Array, dtype: Any) -> Array:
    return table_VD.astype(dtype)[index]


def _rows_gradient(dtype: Any, saved: tuple[Array, Array], rows_grad: Array):
    table_VD, index = saved
    return jnp.zeros_like(table_VD).at[index].add(rows_grad.astype(table_VD.dtype)), None


_narrow_product = jax.custom_vjp(_product, nondiff_argnums=(2,))
_narrow_product.defvjp(_product_saving, _product_gradients)
_narrow_plus = jax.custom_vjp(_plus)
_narrow_plus.defvjp(lambda y, bias: (_plus(y, bias), bias), _plus_gradients)
_narrow_rows = jax.custom_vjp(_rows, nondiff_argnums=(2,))
_narrow_rows.defvjp(
    lambda table, index, dtype: (_rows(table, index, dtype), (table, index)), _rows_gradient
)
