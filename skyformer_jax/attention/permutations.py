"""Permutations of the rows and numbers of a sequence, implemented separately for each platform.

Reformer sorts each head's tokens by bucket, in each round of hashing. An order is int32 [batch,
heads, rounds, length], a permutation along its last axis: the row that goes to each place. Its
inverse gives the place of each row.
"""

import jax
import jax.numpy as jnp

from skyformer_jax.attention.derivatives import with_rules


def sorted_order(numbers: jax.Array) -> jax.Array:
    """Returns the order of a stable sort of int [batch, heads, rounds, length]."""
    return jax.lax.sort((numbers, _positions(numbers)), num_keys=1)[1]


def inverse(order: jax.Array) -> jax.Array:
    """Returns the inverse of an order; by a sort on TPUs, which scatter one number at a time."""

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
    """Returns x[order] along the last axis, in the same shape and without a gradient.

    TPUs would gather one number at a time, so there x is sorted along with the inverse order.
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
    )  # not a sum over an axis: TPUs would first write all rounds to memory
    return sum(others, start=first)


def _rows(rows: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, order[..., None], axis=-2, mode="promise_in_bounds")


def rows_in_orders(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    """Returns rows [batch, heads, length, c] in every round's order.

    The result is [batch, heads, rounds, length, c].
    """
    return _rows_in_orders(rows, order, inverse_order)


def sum_of_rows(rows: jax.Array, order: jax.Array, inverse_order: jax.Array) -> jax.Array:
    """Puts the rows of each round back in their places and sums over the rounds.

    It is the transpose of rows_in_orders.

    Args:
      rows: [batch, heads, rounds, length, c], in the order of their round.
      order: the order of each round.
      inverse_order: its inverse.

    Returns:
      [batch, heads, length, c].
    """
    return _sum_of_rows(rows, order, inverse_order)


# JAX would transpose a gather to a scatter, which adds one row at a time.
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
