"""The training state, which a step reads and updates."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from skyformer_jax.attention import REGISTRY
from skyformer_jax.training.mesh import replicated
from skyformer_jax.training.run import Run

# Statistics of each block in a model's collection "statistics": the mean square of its output, and
# the part of the kernel that Skyformer's landmarks miss (nystrom_residual).
STATISTICS = ("mean_square", "residual")


class TrainState(flax.struct.PyTreeNode):
    """The training state of one model, or of several with a leading axis [seeds] on each array.

    Attributes:
      step: int32, number of steps taken.
      rng: uint32 key data; the key of a step is this key folded with the step.
      params: the parameters of the model.
      fixed: random arrays that the model draws at initialisation and keeps, such as Performer's
        features.
      opt_state: the state of the optimizer.
      sums: sums since the last multiple of train.log_every steps. Over finite steps: loss, correct
        and examples. Over the other steps: skipped, their number, and first_skipped, the step
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
        """The variables to apply the model with."""
        return {"params": self.params, "fixed": self.fixed}


def init_state(run: Run, seed: int | jax.Array) -> TrainState:
    """Returns the initial state of one model, a pure function of the seed."""
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
    """Returns a TrainState of jax.ShapeDtypeStructs for one model."""
    return jax.eval_shape(functools.partial(init_state, run), run.config.seed)


def init_states(run: Run) -> TrainState:
    """Returns the initial states of all seeds, [seeds, ...], replicated on the mesh."""
    init = jax.jit(jax.vmap(functools.partial(init_state, run)), out_shardings=replicated(run.mesh))
    return init(jnp.asarray(run.seeds, jnp.uint32))


def take(tree: Any, index: int) -> Any:
    """Returns the tree at an index of the leading axis of each array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
