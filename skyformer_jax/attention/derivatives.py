"""Functions with custom differentiation rules for both forward and reverse mode.

jax.custom_vjp has no forward mode. jax.custom_jvp derives reverse mode by transposing the
computation of the tangents, which would store the intermediate results that recomputation is meant
to avoid. Here, a primitive computes the tangents, and its transpose is the rule for the gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = tuple[jax.Array, ...]


class _Rule(NamedTuple):
    """A function of residuals and other arrays, linear in the latter, that returns a tuple.

    Attributes:
      fast: the function that is evaluated.
      plain: the same function in operations that JAX can differentiate.
    """

    fast: Callable[..., Arrays]
    plain: Callable[..., Arrays]


def with_rules(
    value: Callable[..., Any],
    tangent: Callable[..., jax.Array],
    gradients: Callable[..., Arrays],
    plain_gradients: Callable[..., Arrays] | None = None,
    plain_tangent: Callable[..., jax.Array] | None = None,
) -> Callable[..., jax.Array]:
    """Returns a function with custom rules for its derivatives, in all modes and of all orders.

    Only derivatives of second and higher order differentiate a rule.

    Args:
      value: the function, of floating arrays and of other arrays that have no derivatives. It may
        return a tuple of the output and other results that save the rules a computation. The rules
        then take this tuple's arrays too, after the function's arguments. Higher-order derivatives
        treat these arrays as constants, so functions that JAX differentiates must recompute them.
      tangent: takes these arrays and the tangents of the floating arguments, in which it is linear;
        returns the output's tangent. JAX must be able to differentiate it, unless plain_tangent is
        given.
      gradients: takes these arrays and the output's gradient, in which it is linear; returns the
        gradients of the floating arguments, in their dtypes.
      plain_gradients: the same as gradients, in operations that JAX differentiates correctly; None
        means gradients itself.
      plain_tangent: likewise for tangent.

    Returns:
      A function of the same arrays that returns only the output.
    """

    def in_tuple(tangent: Callable[..., jax.Array]) -> Callable[..., Arrays]:
        return lambda *arrays: (tangent(*arrays),)

    def all_results(*arrays: jax.Array) -> Arrays:
        results = value(*arrays)
        return results if isinstance(results, tuple) else (results,)

    forward = _Rule(in_tuple(tangent), in_tuple(plain_tangent or tangent))
    backward = _Rule(gradients, plain_gradients or gradients)

    def jvp(primals: Arrays, dots: Arrays) -> tuple[Arrays, Arrays]:
        floating = [
            dot
            for x, dot in zip(primals, dots, strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        results = with_jvp(*primals)
        known = tuple(map(jax.lax.stop_gradient, results)) if len(results) > 1 else ()
        (out_dot,) = _linear.bind(
            *primals,
            *known,
            *floating,
            rule=forward,
            transposed=backward,
            num_residuals=len(primals) + len(known),
        )
        return results, (out_dot, *map(jnp.zeros_like, results[1:]))

    with_jvp = jax.custom_jvp(all_results)
    with_jvp.defjvp(jvp)
    return lambda *arrays: with_jvp(*arrays)[0]


# The primitive computes rule.fast(*arrays), linear in all arrays but the first num_residuals.
_linear = Primitive("linear_by_rule")
_linear.multiple_results = True


def _computed(*arrays: jax.Array, rule: _Rule, **_: Any) -> list[jax.Array]:
    return list(rule.fast(*arrays))


def _types(*types: Any, rule: _Rule, **_: Any) -> Any:
    return jax.make_jaxpr(rule.plain)(*types).out_avals


def _jvp(
    primals: Arrays, tangents: Arrays, *, num_residuals: int, rule: _Rule, transposed: _Rule
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Applies the rule to tangents of linear arguments; differentiates plain for the residuals."""
    bind = functools.partial(
        _linear.bind, rule=rule, transposed=transposed, num_residuals=num_residuals
    )
    residuals, linear = primals[:num_residuals], primals[num_residuals:]
    outs = bind(*primals)
    dots = [jnp.zeros_like(out) for out in outs]
    moving = [i for i in range(num_residuals) if not isinstance(tangents[i], ad.Zero)]
    if any(not isinstance(t, ad.Zero) for t in tangents[num_residuals:]):
        dots = bind(*residuals, *map(ad.instantiate_zeros, tangents[num_residuals:]))
    if moving:

        def by_residuals(*moved: jax.Array) -> Arrays:
            all_residuals = list(residuals)
            for i, array in zip(moving, moved, strict=True):
                all_residuals[i] = array
            return tuple(rule.plain(*all_residuals, *linear))

        at, towards = (tuple(x[i] for i in moving) for x in (primals, tangents))
        more = jax.jvp(by_residuals, at, towards)[1]
        dots = [a + b for a, b in zip(dots, more, strict=True)]
    return outs, dots


def _transpose(
    cotangents: list[Any], *arrays: Any, num_residuals: int, rule: _Rule, transposed: _Rule
) -> list[Any]:
    outs = _linear.bind(
        *arrays[:num_residuals],
        *map(ad.instantiate_zeros, cotangents),
        rule=transposed,
        transposed=rule,
        num_residuals=num_residuals,
    )
    linear = arrays[num_residuals:]
    wanted = [
        out if ad.is_undefined_primal(x) else None for out, x in zip(outs, linear, strict=True)
    ]
    return [None] * num_residuals + wanted


def _batched(
    arrays: Arrays, axes: tuple[Any, ...], *, num_residuals: int, rule: _Rule, transposed: _Rule
) -> tuple[list[jax.Array], list[int]]:
    """Maps both rules over the residuals' axes and over the first axis of all other arrays."""
    (size,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}

    def mapped(rule: _Rule) -> _Rule:
        def call(function: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
            in_axes = (*axes[:num_residuals], *(0,) * (len(arrays) - num_residuals))
            return tuple(jax.vmap(function, in_axes)(*arrays))

        return _Rule(*(functools.partial(call, function) for function in rule))

    linear = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays[num_residuals:], axes[num_residuals:], strict=True)
    ]
    outs = _linear.bind(
        *arrays[:num_residuals],
        *linear,
        rule=mapped(rule),
        transposed=mapped(transposed),
        num_residuals=num_residuals,
    )
    return outs, [0] * len(outs)


_linear.def_impl(_computed)
_linear.def_abstract_eval(_types)
mlir.register_lowering(_linear, mlir.lower_fun(_computed, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batched
