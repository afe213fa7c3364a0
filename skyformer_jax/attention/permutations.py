"""Rows and numbers of a sequence in other orders, moved as suits the platform of the program.

Reformer sorts each head's tokens by bucket, in each round of hashing. An order is int32 [batch,
heads, rounds, length], each [length] of it a permutation: which row comes to stand at a place. Its
inverse says where each row has come to stand.
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.derivatives import with_rules


def sorted_order(numbers: jax.Array) -> jax.Array:
    """The order that sorts int [batch, heads, rounds, length], stable."""
    return jax.lax.sort((numbers, _positions(numbers)), num_keys=1)[1]


def inverse(order: jax.Array) -> jax.Array:
    """The inverse of an order. TPUs scatter number by number, and sort at once."""

    def by_sort(order: jax.Array) -> jax.Array:
        return sorted_order(order)

    def by_scatter(order: jax.Array) -> jax.Array:
        return jnp.put_along_axis(
            jnp.zeros_like(order),
            order,
            _positions(order),
            axis=-1,
            inplace=False,
            mode="promise_in_bounds",
        )

    return jax.lax.platform_dependent(order, tpu=by_sort, default=by_scatter)


def numbers_in_order(x: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    """x[order] along the last axis, of the same shape. It has no derivatives.

    TPUs would gather number by number; there x is sorted along with the inverse order.
    """

    def by_gather(x: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
        del inverse_order
        return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")

    def by_sort(x: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
        del order
        return jax.lax.sort((inverse_order, x), num_keys=1)[1]

    x = jax.lax.stop_gradient(x)
    return jax.lax.platform_dependent(x, order, inverse_order, tpu=by_sort, default=by_gather)


def _gathered(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    del inverse_order
    return _rows(rows[:, :, None], order)


def _summed(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    del order
    first, *others = (
        _rows(rows[:, :, i], inverse_order[:, :, i]) for i in range(rows.shape[2])
    )  # no sum over an axis: TPUs would write all rounds out first
    return sum(others, start=first)


def _rows(rows: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, order[..., None], axis=-2, mode="promise_in_bounds")


def rows_in_orders(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    """Rows [batch, heads, length, c] in every round's order: [batch, heads, rounds, length, c]."""
    return _rows_in_orders(rows, order, inverse_order)


def sum_of_rows(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    """The transpose of rows_in_orders.

    Args:
      rows: [batch, heads, rounds, length, c], in the order of their round.
      order: the order of each round.
      inverse_order: its inverse.

    Returns:
      [batch, heads, length, c], the sum over the rounds of rows that are back in their places.
    """
    return _sum_of_rows(rows, order, inverse_order)


# JAX would transpose a gather to a scatter, which adds row by row.
_rows_in_orders = with_rules(
    _gathered,
    lambda rows, order, inverse_order, tangent: _gathered(tangent, order, inverse_order),
    lambda rows, order, inverse_order, gradient: (_summed(gradient, order, inverse_order),),
)
_sum_of_rows = with_rules(
    _summed,
    lambda rows, order, inverse_order, tangent: _summed(tangent, order, inverse_order),
    lambda rows, order, inverse_order, gradient: (_gathered(gradient, order, inverse_order),),
)


def _positions(order: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(order.shape[-1], dtype=jnp.int32), order.shape)
