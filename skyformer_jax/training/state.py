"""The state of training: what a step reads and changes."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from skyformer_jax.attention import REGISTRY
from skyformer_jax.training.mesh import replicated
from skyformer_jax.training.run import Run

# What models collect of each block, of their collection "statistics": the mean square of what it
# returns, and what Skyformer's landmarks leave of the kernel (nystrom_residual).
STATISTICS = ("mean_square", "residual")


class TrainState(flax.struct.PyTreeNode):
    """The state of one model; with a leading axis on every array, of one model for each seed.

    Attributes:
      step: int32, steps taken.
      rng: uint32 key data; the key of a step is folded from it and the step's number.
      params: the model's parameters.
      fixed: random arrays that the model drew at the start and keeps, such as Performer's features.
      opt_state: the optimizer's state.
      sums: sums since the last multiple of train.log_every steps. Over finite steps: loss, correct
        predictions, examples. Over the others: skipped, their number, and first_skipped, the step
        of the first. With train.statistics also gradient_norm, of the mean gradient before
        clipping, and those of STATISTICS that the model has, each [layers].
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    fixed: Any
    opt_state: Any
    sums: dict[str, jax.Array]

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that the model is applied with."""
        return {"params": self.params, "fixed": self.fixed}


def init_state(run: Run, seed: int | jax.Array) -> TrainState:
    """The state of one model before the first step; a pure function of the seed."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, *run.token_shape), jnp.uint8)
    whole_sequences = run.model.clone(axis_name=None)
    variables = whole_sequences.init(init_key, tokens, jnp.ones(tokens.shape, bool))
    params = variables["params"]
    sums = {name: jnp.float32(0) for name in ("loss", "correct", "examples")}
    sums |= {name: jnp.int32(0) for name in ("skipped", "first_skipped")}
    if run.config.train.statistics:
        of_blocks = jnp.zeros(run.config.model.num_layers, jnp.float32)
        sums |= {"gradient_norm": jnp.float32(0), "mean_square": of_blocks}
        if REGISTRY[run.config.attention.name].residual is not None:
            sums["residual"] = of_blocks
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(train_key),
        params=params,
        fixed=variables.get("fixed", {}),
        opt_state=run.optimizer.init(params),
        sums=sums,
    )


@functools.lru_cache(maxsize=8)
def state_spec(run: Run) -> TrainState:
    """Shapes and dtypes of the state of one model, a TrainState of jax.ShapeDtypeStructs."""
    return jax.eval_shape(functools.partial(init_state, run), run.config.seed)


def init_states(run: Run) -> TrainState:
    """The states of all seeds before the first step, [seeds, ...], on every device of the mesh."""
    init = jax.jit(jax.vmap(functools.partial(init_state, run)), out_shardings=replicated(run.mesh))
    return init(jnp.asarray(run.seeds, jnp.uint32))


def take(tree: Any, index: int) -> Any:
    """One of the trees that are stacked along the leading axis of each array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
