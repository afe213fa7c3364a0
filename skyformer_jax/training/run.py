"""The objects of a run, built once from its config: model, optimizer, task and mesh."""

import dataclasses

import flax.linen as nn
import jax
import ml_collections
import optax
from jax.sharding import Mesh

from skyformer_jax import tasks
from skyformer_jax.data.batches import Stage, padded_length
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError, full_disk
from skyformer_jax.models import build_model
from skyformer_jax.training.config import check, mesh_shape
from skyformer_jax.training.mesh import make_mesh, sequence_axis
from skyformer_jax.training.optimizer import make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that the steps, the data and the evaluation of a run depend on.

    Runs are hashable by identity.

    Attributes:
      config: the complete configuration; treat it as immutable.
      task: the task of the config.
      mesh: the device mesh, with axes "data" and "seq".
      model: the classifier; it takes shards of sequences if the mesh shards them along "seq".
      schedule: maps a step to the learning rate.
      optimizer: the optax transformation, with this schedule.
    """

    config: ml_collections.ConfigDict
    task: tasks.Task
    mesh: Mesh
    model: nn.Module
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the models that the run trains at once."""
        return tuple(range(self.config.seed, self.config.seed + self.config.num_seeds))

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of the padded tokens of an example: (length,), or (2, length) for pairs."""
        length, documents = self.config.model.max_length, self.config.model.num_documents
        return (length,) if documents == 1 else (documents, length)

    def load_split(self, split: str) -> Examples:
        """Loads the examples of a split; prepares the data first if they are missing.

        Args:
          split: "train", "validation" or "test".

        Raises:
          UserError: see Task.load; or if an example is longer than model.max_length.
        """
        return self._load(self.task, split)

    def load_stages(self) -> tuple[Stage, ...]:
        """Loads the training examples: those of the curriculum, and then those of the task.

        Raises:
          UserError: as load_split.
        """
        train = self.config.train
        easier = (
            Stage(self._load(tasks.get(name), "train"), end)
            for name, end in zip(train.curriculum, train.curriculum_steps, strict=True)
        )
        return (*easier, Stage(self.load_split("train")))

    def _load(self, task: tasks.Task, split: str) -> Examples:
        data = self.config.data
        options = {option: data[option] for option in task.options if option in data}
        if task is self.task or task.source_config is not None:  # others are only generated
            options |= {"source": data.source or None, "kind": data.kind}
        with full_disk(data.dir):
            examples = task.load(split, data.dir, **options)
        if data.drop_below:
            examples = examples.drop_below(data.drop_below)
        padded_length(int(examples.lengths.max()), self.config.model.max_length, ())
        return examples


def make_run(config: ml_collections.ConfigDict, mesh: Mesh) -> Run:
    """Builds the run of a checked config on a mesh."""
    schedule = make_schedule(config.train)
    return Run(
        config=config,
        task=tasks.of(config),
        mesh=mesh,
        model=build_model(config, axis_name=sequence_axis(mesh)),
        schedule=schedule,
        optimizer=make_optimizer(schedule, weight_decay=config.train.weight_decay),
    )


def new_run(config: ml_collections.ConfigDict) -> Run:
    """Checks a config and builds its run on all devices, on the mesh of config.parallel.

    Raises:
      UserError: for the first field of the config that is invalid.
    """
    num_devices = jax.device_count()
    check(config, num_devices)
    if config.parallel.backend == "pmap" and jax.process_count() > 1:
        raise UserError("parallel.backend=pmap is for one process; several need shard_map")
    return make_run(config, make_mesh(*mesh_shape(config, num_devices)))
