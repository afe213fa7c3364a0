"""One training step and one prediction of one model, on one device's shard of a batch.

sharded_step.py maps them over the devices of a mesh with the axes "data" and "seq".
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from skyformer_jax.attention import shards
from skyformer_jax.data.batches import Batch
from skyformer_jax.training.mesh import DATA
from skyformer_jax.training.run import Run
from skyformer_jax.training.state import STATISTICS, TrainState, take

# Tokens in a CPU's microbatch: few enough that the activations stay in its caches, and that their
# memory is not requested from the system page by page (docs/speed.md).
_CPU_TOKENS = 4096


def train_step(run: Run, state: TrainState, batch: Batch) -> TrainState:
    """Takes one optimizer step on this device's shard of a batch.

    The axis "data" shards the examples; if the model has an axis_name, that axis shards their
    sequences. The shard is computed in microbatches whose gradients are summed: only one microbatch
    is in memory at a time, and the result is the same up to rounding.

    If the loss or a gradient is not finite, the step changes only step and the sums.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # An example's key depends on its position in the global batch.
    local_batch = len(batch.label)
    keys = fold_in_each(rng, jax.lax.axis_index(DATA) * local_batch + jnp.arange(local_batch))
    statistics = tuple(name for name in STATISTICS if name in state.sums)

    def loss_fn(
        params: Any, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": params, "fixed": state.fixed}
        logits, sown = _apply(run, variables, batch, keys, train=True, statistics=statistics)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
        correct = (logits.argmax(axis=-1) == batch.label).sum()
        sums = {
            "loss": losses.sum(),
            "correct": correct.astype(jnp.float32),
            "examples": jnp.float32(len(losses)),
        }
        sums |= {name: values.sum(axis=0) for name, values in sown.items()}
        return losses.sum() / local_batch, sums

    gradient_fn = functools.partial(jax.grad(loss_fn, has_aux=True), state.params)
    gradients, sums = _accumulate(gradient_fn, _microbatches(run, batch, keys))
    # Every device along "seq" computes the whole loss, and differentiation gives the gradient of
    # the sum of these losses. The mean over the devices is then the gradient of one loss.
    axes = (DATA,) if run.model.axis_name is None else (DATA, run.model.axis_name)
    gradients = jax.lax.pmean(gradients, axes)
    sums = jax.lax.psum(sums, DATA)
    if statistics:
        sums["gradient_norm"] = optax.tree.norm(gradients)
        sums |= {name: sums[name] / sums["examples"] for name in statistics}
    return _update(run, state, gradients, sums)


def _accumulate(gradient_fn: Any, microbatches: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Adds up gradients and sums over the microbatches [microbatches, ...], one at a time."""
    if len(jax.tree.leaves(microbatches)[0]) == 1:
        return gradient_fn(*take(microbatches, 0))

    def add(total: Any, microbatch: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_fn(*microbatch)), None

    shapes = jax.eval_shape(gradient_fn, *take(microbatches, 0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return total


def _update(run: Run, state: TrainState, gradients: Any, sums: dict[str, jax.Array]) -> TrainState:
    """Applies the optimizer, or counts the step as skipped if not all values are finite."""
    finite = jnp.isfinite(sums["loss"])
    for gradient in jax.tree.leaves(gradients):
        finite &= jnp.isfinite(gradient).all()
    updates, opt_state = run.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state, sums = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, sums),
        (state.params, state.opt_state, jax.tree.map(jnp.zeros_like, sums)),
    )
    sums_begin = state.step % run.config.train.log_every == 0
    before = jax.tree.map(lambda x: jnp.where(sums_begin, jnp.zeros_like(x), x), state.sums)
    first = ~finite & (before["skipped"] == 0)
    sums["skipped"] = (~finite).astype(jnp.int32)
    sums["first_skipped"] = jnp.where(first, state.step + 1, 0)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        sums=jax.tree.map(jnp.add, before, sums),
    )


def predict_step(
    run: Run, variables: Any, batch: Batch, rng: jax.Array | None, rows: jax.Array
) -> jax.Array:
    """Computes the logits of this device's shard of a batch, without dropout.

    Args:
      run: the run.
      variables: the variables of a TrainState.
      batch: this device's examples.
      rng: key for drawing landmarks, folded with each example's row; None is deterministic.
      rows: int [local batch], positions of the examples in the split.

    Returns:
      float32 [local batch, classes].
    """
    keys = None if rng is None else fold_in_each(rng, rows)
    logits = jax.lax.map(
        lambda microbatch: _apply(run, variables, *microbatch, train=False)[0],
        _microbatches(run, batch, keys, accumulation=0),
    )
    return logits.reshape(-1, logits.shape[-1])


def _apply(
    run: Run,
    variables: Any,
    batch: Batch,
    keys: jax.Array | None,
    *,
    train: bool,
    statistics: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies the model: logits [batch, classes], and the statistics, each [batch, layers].

    The model is mapped over the examples, each with its own key, so that an example's random
    numbers depend on its position in the global batch, not on the number of devices.
    """
    places = shards.positions(batch.tokens.shape[-1], run.model.axis_name)

    def one(
        values: jax.Array, length: jax.Array, positions: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rngs = {}
        if key is not None:
            rngs["landmarks"], rngs["dropout"] = jax.random.split(key)
        tokens, mask = tokens_and_mask(run, values, length, places)
        logits, sown = run.model.apply(
            variables,
            tokens[None],
            mask[None],
            positions=None if positions is None else positions[None],
            deterministic=not train,
            rngs=rngs,
            mutable=["statistics"] if statistics else [],
        )
        return logits[0], {name: sown["statistics"][name] for name in statistics}

    arrays: Any = (batch.tokens, batch.length, batch.positions, keys)
    return jax.vmap(one, in_axes=tuple(None if x is None else 0 for x in arrays))(*arrays)


def tokens_and_mask(
    run: Run, values: jax.Array, length: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the inputs of a model from the stored values of a batch.

    With data.mask_zeros, stored values of 0 count as padding wherever they occur.

    Args:
      run: the run, for its tokenizer and data.mask_zeros.
      values: uint8 [..., length].
      length: int [...], numbers of real tokens of the whole sequences.
      positions: int [length], positions of the values in the whole sequences.

    Returns:
      Tokens, int32 [..., length], 0 at padding; and mask, bool [..., length], True at real tokens.
    """
    mask = positions < length[..., None]
    if run.config.data.mask_zeros:
        mask &= values != 0
    return jnp.where(mask, run.task.tokenizer(values), 0), mask


def fold_in_each(rng: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns a key for each of the numbers, int [examples]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)


def num_microbatches(accumulation: int, platform: str, num_examples: int, tokens: int) -> int:
    """Returns the number of microbatches in which a device computes its shard of a batch.

    Args:
      accumulation: train.accumulation. 0 means one microbatch on accelerators, and on CPUs the
        fewest of at most _CPU_TOKENS tokens each, or of one example each.
      platform: the platform of the device, such as "cpu" or "gpu".
      num_examples: number of examples of the shard.
      tokens: number of tokens of an example, padding included.
    """
    if accumulation:
        return accumulation
    if platform != "cpu":
        return 1
    most = max(1, _CPU_TOKENS // tokens)
    size = max(n for n in range(1, min(num_examples, most) + 1) if num_examples % n == 0)
    return num_examples // size


def _microbatches(
    run: Run, batch: Batch, keys: jax.Array | None, accumulation: int | None = None
) -> tuple[Batch, jax.Array | None]:
    """Reshapes a batch and its keys [examples, ...] to [microbatches, examples, ...]."""
    number = num_microbatches(
        run.config.train.accumulation if accumulation is None else accumulation,
        run.mesh.devices.flat[0].platform,
        len(batch.label),
        math.prod(batch.tokens.shape[1:]),
    )
    return jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), (batch, keys))
