"""One training step and one prediction, for one device, and their spreading over a mesh.

train_step and predict_step are of one model. What is compiled for the mesh maps them over several
at once, of different seeds, and takes several steps in a row: its states have a first axis of
seeds, its training batches first axes of steps and of seeds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from skyformer_jax import tasks
from skyformer_jax.attention import shards
from skyformer_jax.data.batches import Batch
from skyformer_jax.data.examples import Examples
from skyformer_jax.training.mesh import DATA, memory_limit, replicated, specs, spread

# Tokens that a CPU computes at a time: what a layer makes of them stays in its caches, and the
# memory for it is not fetched anew from the system, page by page (docs/speed.md).
_CPU_TOKENS = 4096


@flax.struct.dataclass
class TrainState:
    """All that a step reads and changes.

    Attributes:
      step: int32, steps taken.
      rng: uint32 key data; the key of a step is folded from it and the step's number.
      params: the model's parameters.
      fixed: what the model drew at the start and keeps, Performer's features for example.
      opt_state: the optimizer's.
      sums: since the last multiple of log_every steps, over the steps that were finite: loss,
        correct predictions, examples; over the others: skipped, how many there were, and
        first_skipped, the number of the first. With statistics also gradient_norm, of the mean
        gradient before clipping, and mean_square [layers], of what each block returns.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    fixed: Any
    opt_state: Any
    sums: dict[str, jax.Array]

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to."""
        return {"params": self.params, "fixed": self.fixed}


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The one-cycle policy with linear annealing, as the paper's runs used it.

    From peak/25 up to the peak in train.warmup_steps, then down to peak/250,000 at
    train.num_steps.
    """
    peak, warmup = config.train.learning_rate, config.train.warmup_steps
    fall = optax.linear_schedule(peak, peak / 25e4, config.train.num_steps - warmup)
    if not warmup:
        return fall
    return optax.join_schedules([optax.linear_schedule(peak / 25, peak, warmup), fall], [warmup])


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW (b1 0.9, b2 0.999, eps 1e-6) on gradients clipped by value at 1."""
    return optax.chain(
        optax.clip(1.0),
        optax.adamw(
            learning_rate_schedule(config), eps=1e-6, weight_decay=config.train.weight_decay
        ),
    )


def init_state(
    seed: int,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    token_shape: tuple[int, ...],
    statistics: bool = False,
) -> TrainState:
    """The state before the first step; a pure function, to be jitted or only shape-evaluated.

    token_shape is that of an example's tokens: (length,), or (2, length) for pairs of documents;
    statistics adds what TrainState says to its sums.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, *token_shape), jnp.uint8)
    whole = model.clone(axis_name=None)
    variables = whole.init(init_key, tokens, jnp.ones(tokens.shape, bool))
    params = variables["params"]
    sums = {name: jnp.float32(0) for name in ("loss", "correct", "examples")}
    sums |= {name: jnp.int32(0) for name in ("skipped", "first_skipped")}
    if statistics:
        sums |= {"gradient_norm": jnp.float32(0), "mean_square": jnp.zeros(model.num_layers)}
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(train_key),
        params=params,
        fixed=variables.get("fixed", {}),
        opt_state=optimizer.init(params),
        sums=sums,
    )


def init_states(
    seeds: Sequence[int],
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    token_shape: tuple[int, ...],
    statistics: bool = False,
) -> TrainState:
    """The states of init_state for each of the seeds, along a first axis."""
    init = functools.partial(
        init_state,
        model=model,
        optimizer=optimizer,
        token_shape=token_shape,
        statistics=statistics,
    )
    return jax.vmap(init)(jnp.asarray(seeds, jnp.uint32))


def take(tree: Any, index: int) -> Any:
    """One of the trees that are stacked along a first axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def token_shape(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Shape of an example's tokens, padded: (length,), or (2, length) for pairs of documents."""
    documents = config.model.get("num_documents", 1)
    return (config.model.max_length,) if documents == 1 else (documents, config.model.max_length)


class Reading(NamedTuple):
    """How the bytes of a batch become a model's tokens and mask.

    Attributes:
      shift: token id = byte + shift.
      mask_zeros: True takes tokens of value 0 for padding, wherever they stand.
    """

    shift: int = 0
    mask_zeros: bool = False

    def __call__(
        self, values: jax.Array, length: jax.Array, places: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Reads.

        Args:
          values: uint8 [..., length].
          length: int [...], of the whole sequences.
          places: int [length], the positions in them that the values have.

        Returns:
          tokens int32 and mask bool, both as values.
        """
        mask = places < length[..., None]
        if self.mask_zeros:
            mask &= values != 0
        return jnp.where(mask, values.astype(jnp.int32) + self.shift, 0), mask


def reading_of(config: ml_collections.ConfigDict) -> Reading:
    """How the model's tokens and mask are had from the task's bytes."""
    return Reading(tasks.get(config.task).tokenizer.offset, config.data.get("mask_zeros", False))


def abstract_state(
    config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes and dtypes of the state of one model, without computing it."""
    make = functools.partial(
        init_state,
        config.seed,
        model,
        optimizer,
        token_shape(config),
        config.train.get("statistics", False),
    )
    return jax.eval_shape(make)


class Table(NamedTuple):
    """A split on the devices, from which steps read their batches themselves.

    Attributes:
      values: uint8 [tokens], as in Examples.
      starts: int32 [examples * documents + 1], likewise.
      label: int32 [examples].
    """

    values: jax.Array
    starts: jax.Array
    label: jax.Array


def make_table(examples: Examples, mesh: jax.sharding.Mesh) -> Table | None:
    """The split on every device of the mesh; None if it would take a quarter of their memory.

    So it is too if there are more tokens than 32 bits count.
    """
    arrays = Table(examples.values, examples.starts, examples.label)
    too_large = 4 * sum(x.nbytes for x in arrays) > memory_limit()
    if examples.values.size >= 2**31 or too_large:
        return None
    arrays = arrays._replace(starts=examples.starts.astype(np.int32))
    return jax.device_put(arrays, replicated(mesh))


def read_batch(
    table: Table,
    rows: jax.Array,
    token_shape: tuple[int, ...],
    axis_name: str | None = None,
) -> Batch:
    """The batch that data.batches.make_batch makes on the host.

    Args:
      table: of make_table.
      rows: int32 [..., batch].
      token_shape: see the function of that name.
      axis_name: mesh axis over which sequences are split; the tokens are then this device's.

    Returns:
      tokens uint8 [..., batch] + token_shape, those after an example's end being any; length and
      label accordingly.
    """
    documents = math.prod(token_shape[:-1])
    first = rows[..., None] * documents + jnp.arange(documents)
    begin, end = table.starts[first], table.starts[first + 1]
    here = shards.places(token_shape[-1] // shards.num_shards(axis_name), axis_name)
    places = jnp.minimum(begin[..., None] + here, len(table.values) - 1)
    tokens, length = table.values[places], end - begin
    return Batch(
        tokens.reshape(*rows.shape, *token_shape[:-1], len(here)),
        length.reshape(*rows.shape, *token_shape[:-1]),
        table.label[rows],
    )


def _logits(
    model: nn.Module,
    variables: Any,
    batch: Batch,
    keys: jax.Array | None,
    *,
    reading: Reading,
    train: bool,
    statistics: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Logits [batch, classes], each example with its own random key; with statistics mean squares.

    The model is mapped over the examples, so that what is random about one depends on its place in
    the global batch, not on how many devices share the work.
    """
    places = shards.places(batch.tokens.shape[-1], model.axis_name)

    def one(
        values: jax.Array, length: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        rngs = {}
        if key is not None:
            rngs["landmarks"], rngs["dropout"] = jax.random.split(key)
        tokens, mask = reading(values, length, places)
        logits, sown = model.apply(
            variables,
            tokens[None],
            mask[None],
            deterministic=not train,
            rngs=rngs,
            mutable=["statistics"] if statistics else [],
        )
        return logits[0], sown["statistics"]["mean_square"] if statistics else None

    return jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(
        batch.tokens, batch.length, keys
    )


def _in_parts(batch: Batch, keys: jax.Array | None, accumulation: int = 0) -> Any:
    """The batch and the keys, [examples, ...], as [parts, examples of a part, ...].

    accumulation is the number of parts; 0 chooses it: all at once but on a CPU, where a part has
    _CPU_TOKENS, or one example.
    """
    examples = len(batch.label)
    if not accumulation:
        size = examples
        if jax.default_backend() == "cpu":
            most = max(1, _CPU_TOKENS // math.prod(batch.tokens.shape[1:]))
            size = max(n for n in range(1, min(examples, most) + 1) if examples % n == 0)
        accumulation = examples // size
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), (batch, keys))


def _keys(rng: jax.Array, places: jax.Array) -> jax.Array:
    """A key for each of the places, int [examples]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, places)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    log_every: int,
    reading: Reading,
    accumulation: int,
) -> TrainState:
    """One step on this device's share of the batch; named axes join the shares.

    The axis "data" divides the examples; where the model has an axis_name, that one divides their
    sequences. The share is computed in `accumulation` equal parts, one after another, whose
    gradients are added: memory is that of a part, and the result differs by rounding alone. 0
    leaves the number of parts to the device.

    Where the loss or a gradient is not finite, the step changes nothing but the counts in sums.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # By each example's place in the global batch.
    local_batch = len(batch.label)
    keys = _keys(rng, jax.lax.axis_index(DATA) * local_batch + jnp.arange(local_batch))
    statistics = "mean_square" in state.sums

    def loss_fn(
        params: Any, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": params, "fixed": state.fixed}
        logits, mean_square = _logits(
            model, variables, batch, keys, reading=reading, train=True, statistics=statistics
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
        correct = (logits.argmax(axis=-1) == batch.label).sum()
        sums = {
            "loss": losses.sum(),
            "correct": correct.astype(jnp.float32),
            "examples": jnp.float32(len(losses)),
        }
        if statistics:
            sums["mean_square"] = mean_square.sum(axis=0)
        return losses.sum() / local_batch, sums

    differentiate = functools.partial(jax.grad(loss_fn, has_aux=True), state.params)
    parts = _in_parts(batch, keys, accumulation)
    if len(parts[0].label) == 1:
        gradients, sums = differentiate(batch, keys)
    else:

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(*part)), None

        shapes = jax.eval_shape(differentiate, *take(parts, 0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), _ = jax.lax.scan(add, zeros, parts)
    # Every device of the sequence's axis has the whole loss, so that what it differentiates is the
    # sum of these: the mean of the gradients is that of one.
    axes = (DATA,) if model.axis_name is None else (DATA, model.axis_name)
    gradients = jax.lax.pmean(gradients, axes)
    sums = jax.lax.psum(sums, DATA)
    finite = jnp.isfinite(sums["loss"])
    for gradient in jax.tree.leaves(gradients):
        finite &= jnp.isfinite(gradient).all()
    if statistics:
        sums["gradient_norm"] = optax.tree.norm(gradients)
        sums["mean_square"] /= sums["examples"]

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state, sums = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, sums),
        (state.params, state.opt_state, jax.tree.map(jnp.zeros_like, sums)),
    )
    before = jax.tree.map(
        lambda x: jnp.where(state.step % log_every == 0, jnp.zeros_like(x), x), state.sums
    )
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
    variables: Any,
    batch: Batch,
    rng: jax.Array | None,
    rows: jax.Array,
    *,
    model: nn.Module,
    reading: Reading,
) -> jax.Array:
    """Logits [local batch, classes] without dropout.

    variables are those of the TrainState. rng, if any, draws the landmarks, by each example's place
    in the split, which rows, int [local batch], gives.
    """
    parts = _in_parts(batch, None if rng is None else _keys(rng, rows))
    logits = jax.lax.map(
        lambda part: _logits(model, variables, *part, reading=reading, train=False)[0], parts
    )
    return logits.reshape(-1, logits.shape[-1])


def train_step_of(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """make_train_step as the config says."""
    return make_train_step(
        model,
        optimizer,
        mesh,
        config.train.log_every,
        reading_of(config),
        config.train.accumulation,
        token_shape(config),
        config.parallel.backend,
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    log_every: int,
    reading: Reading,
    accumulation: int = 0,
    token_shape: tuple[int, ...] = (),
    backend: str = "shard_map",
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """train_step on every device of the mesh, for every seed and several times, compiled.

    The model's axis_name must be mesh.sequence_axis(mesh); for backend see mesh.spread.

    The function takes states [seeds], which are used up, and batches [steps, seeds, batch], or a
    Table and the rows of these batches, int32, for which token_shape is needed. It returns the
    states after the steps, and a copy of their sums.
    """
    one_step = jax.vmap(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            log_every=log_every,
            reading=reading,
            accumulation=accumulation,
        )
    )

    def all_steps(
        states: TrainState, batches: Batch | jax.Array, table: Table | None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def step(states: TrainState, batch: Batch | jax.Array) -> tuple[TrainState, None]:
            if table is not None:
                batch = read_batch(table, batch, token_shape, model.axis_name)
            return one_step(states, batch), None

        if len(jax.tree.leaves(batches)[0]) == 1:
            states, _ = step(states, take(batches, 0))
        else:
            states, _ = jax.lax.scan(step, states, batches)
        return states, states.sums

    def call(
        states: TrainState, batches: Batch | jax.Array, table: Table | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        in_specs = (P(), specs(batches, axis=2), P())
        return spread(all_steps, mesh, backend, in_specs, (P(), P()))(states, batches, table)

    return jax.jit(call, donate_argnums=0)


def make_predict_step(
    model: nn.Module, mesh: jax.sharding.Mesh, reading: Reading
) -> Callable[[Any, Batch, jax.Array | None, jax.Array], jax.Array]:
    """predict_step on every device of the mesh, for the variables [seeds] of several models.

    The compiled function returns logits [seeds, batch, classes].
    """
    one_step = functools.partial(predict_step, model=model, reading=reading)
    in_all = jax.vmap(one_step, in_axes=(0, None, None, None))

    def call(variables: Any, batch: Batch, rng: jax.Array | None, rows: jax.Array) -> jax.Array:
        in_specs = (P(), specs(batch), P(), P(DATA))
        mapped = spread(in_all, mesh, "shard_map", in_specs, P(None, DATA))
        return mapped(variables, batch, rng, rows)

    # All logits go to all devices, and so to every process.
    return jax.jit(call, out_shardings=replicated(mesh))
