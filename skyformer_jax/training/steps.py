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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from skyformer_jax.data.batches import Batch, Examples

AXIS = "data"

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
      sums: of loss, correct predictions and examples since the last multiple of log_every steps.
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
) -> TrainState:
    """The state before the first step; a pure function, to be jitted or only shape-evaluated.

    token_shape is that of an example's tokens: (length,), or (2, length) for pairs of documents.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, *token_shape), jnp.uint8)
    variables = model.init(init_key, tokens, jnp.ones(tokens.shape, bool))
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(train_key),
        params=params,
        fixed=variables.get("fixed", {}),
        opt_state=optimizer.init(params),
        sums={name: jnp.float32(0) for name in ("loss", "correct", "examples")},
    )


def init_states(
    seeds: Sequence[int],
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    token_shape: tuple[int, ...],
) -> TrainState:
    """The states of init_state for each of the seeds, along a first axis."""
    init = functools.partial(init_state, model=model, optimizer=optimizer, token_shape=token_shape)
    return jax.vmap(init)(jnp.asarray(seeds, jnp.uint32))


def stack(trees: Sequence[Any]) -> Any:
    """Equal trees of arrays as one, along a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: Any, index: int) -> Any:
    """One of the trees that were stacked."""
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

    def __call__(self, values: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values uint8 [..., length], length int [...] -> tokens int32, mask bool, both alike."""
        mask = jnp.arange(values.shape[-1]) < length[..., None]
        if self.mask_zeros:
            mask &= values != 0
        return jnp.where(mask, values.astype(jnp.int32) + self.shift, 0), mask


def abstract_state(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state of one model, without computing it."""
    make = functools.partial(init_state, config.seed, model, optimizer, token_shape(config))
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(make),
    )


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
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if examples.values.size >= 2**31 or 4 * sum(x.nbytes for x in arrays) > memory:
        return None
    arrays = arrays._replace(starts=examples.starts.astype(np.int32))
    return jax.device_put(arrays, NamedSharding(mesh, P()))


def read_batch(table: Table, rows: jax.Array, token_shape: tuple[int, ...]) -> Batch:
    """The batch that data.batches.make_batch makes on the host.

    Args:
      table: of make_table.
      rows: int32 [..., batch].
      token_shape: see the function of that name.

    Returns:
      tokens uint8 [..., batch, *token_shape], those after an example's end being any; length and
      label accordingly.
    """
    documents = math.prod(token_shape[:-1])
    first = rows[..., None] * documents + jnp.arange(documents)
    begin, end = table.starts[first], table.starts[first + 1]
    places = jnp.minimum(begin[..., None] + jnp.arange(token_shape[-1]), len(table.values) - 1)
    tokens, length = table.values[places], end - begin
    return Batch(
        tokens.reshape(*rows.shape, *token_shape),
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
) -> jax.Array:
    """Logits [batch, classes], each example with its own random key.

    The model is mapped over the examples, so that what is random about one depends on its place in
    the global batch, not on how many devices share the work.
    """

    def one(values: jax.Array, length: jax.Array, key: jax.Array | None) -> jax.Array:
        rngs = {}
        if key is not None:
            rngs["landmarks"], rngs["dropout"] = jax.random.split(key)
        tokens, mask = reading(values, length)
        return model.apply(variables, tokens[None], mask[None], deterministic=not train, rngs=rngs)[
            0
        ]

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
    """One step on this device's share of the batch; the named axis joins the shares.

    The share is computed in `accumulation` equal parts, one after another, whose gradients are
    added: memory is that of a part, and the result differs by rounding alone. 0 leaves the number
    of parts to the device.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # By each example's place in the global batch.
    local_batch = len(batch.label)
    keys = _keys(rng, jax.lax.axis_index(AXIS) * local_batch + jnp.arange(local_batch))

    def loss_fn(
        params: Any, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": params, "fixed": state.fixed}
        logits = _logits(model, variables, batch, keys, reading=reading, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
        correct = (logits.argmax(axis=-1) == batch.label).sum()
        return losses.sum() / local_batch, {
            "loss": losses.sum(),
            "correct": correct.astype(jnp.float32),
            "examples": jnp.float32(len(losses)),
        }

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
    gradients = jax.lax.pmean(gradients, AXIS)
    sums = jax.lax.psum(sums, AXIS)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    fresh = state.step % log_every == 0
    sums = jax.tree.map(lambda old, new: jnp.where(fresh, 0, old) + new, state.sums, sums)
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        sums=sums,
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
        lambda part: _logits(model, variables, *part, reading=reading, train=False), parts
    )
    return logits.reshape(-1, logits.shape[-1])


def make_mesh() -> jax.sharding.Mesh:
    """All devices along one data axis."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def shard_batch(batch: Any, mesh: jax.sharding.Mesh, *, axis: int = 0) -> Any:
    """The arrays of this process's share of a batch on its devices, as parts of global arrays.

    Args:
      batch: a tree of arrays.
      mesh: of the devices.
      axis: of the examples: 0, or 2 for the batches that make_train_step's function takes.
    """
    sharding = NamedSharding(mesh, P(*[None] * axis, AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    log_every: int,
    reading: Reading,
    accumulation: int = 0,
    token_shape: tuple[int, ...] = (),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """train_step on every device of the mesh, for every seed and several times, compiled.

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
                batch = read_batch(table, batch, token_shape)
            return one_step(states, batch), None

        if len(jax.tree.leaves(batches)[0]) == 1:
            states, _ = step(states, take(batches, 0))
        else:
            states, _ = jax.lax.scan(step, states, batches)
        return states, states.sums

    # With check_vma=True the gradients of the replicated parameters would be summed before pmean.
    mapped = jax.shard_map(
        all_steps,
        mesh=mesh,
        in_specs=(P(), P(None, None, AXIS), P()),
        out_specs=(P(), P()),
        check_vma=False,
    )

    def call(
        states: TrainState, batches: Batch | jax.Array, table: Table | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return mapped(states, batches, table)

    return jax.jit(call, donate_argnums=0)


def make_predict_step(
    model: nn.Module, mesh: jax.sharding.Mesh, reading: Reading
) -> Callable[[Any, Batch, jax.Array | None, jax.Array], jax.Array]:
    """predict_step on every device of the mesh, for the variables [seeds] of several models.

    The compiled function returns logits [seeds, batch, classes].
    """
    one_step = functools.partial(predict_step, model=model, reading=reading)
    mapped = jax.shard_map(
        jax.vmap(one_step, in_axes=(0, None, None, None)),
        mesh=mesh,
        in_specs=(P(), P(AXIS), P(), P(AXIS)),
        out_specs=P(None, AXIS),
        check_vma=False,
    )
    return jax.jit(mapped)
