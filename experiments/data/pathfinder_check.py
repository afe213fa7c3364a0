"""Compares our Pathfinder images with images of the original generator.

    python -m experiments.data.pathfinder_check --reference=originals.npz

Compares statistics of the images, draws some of both, trains a small convolutional network on ours
and tests it on both, and times our generator. The reference is an NPZ file with the arrays image,
uint8 [images, 32, 32], and label, made by the original generator at "hard". The script takes a
quarter of an hour on two CPU cores; --small uses fewer images and steps.
"""

import itertools
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import flags
from flax import linen as nn
from flax.training.train_state import TrainState
from scipy import ndimage

from experiments.data.pathfinder_discs import find_discs
from experiments.records import Row, provenance, replacing, write_json
from skyformer_jax import cli
from skyformer_jax.data import pathfinder
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track

_REFERENCE = flags.DEFINE_string("reference", None, "NPZ file of original images.", required=True)
_OUT = flags.DEFINE_string(
    "out", "results/pathfinder_check.json", "JSON to write; the picture gets the suffix .png."
)
_SMALL = flags.DEFINE_bool("small", False, "The reduced setting for a CPU or a test.")

# Trained on "hard" from the start, the network stays at chance for long: begin with short targets.
_CURRICULUM = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12)  # dashes
_GOOD = 0.8  # accuracy on the last _WINDOW batches at which training moves to longer targets
_WINDOW = 40
_BATCH = 64
_LEARNING_RATE = 2e-3

Set = tuple[np.ndarray, np.ndarray]


class Sizes(NamedTuple):
    """Numbers of our images, and of training steps."""

    compared: int = 5000
    curriculum: int = 5000  # for each of _CURRICULUM
    train: int = 20_000
    test: int = 4000
    steps: int = 2600
    timed: int = 200  # of each size and difficulty


_SMALL_SIZES = Sizes(compared=100, curriculum=128, train=128, test=100, steps=20, timed=5)


def read_reference(path: str) -> Set:
    """Reads images, uint8 [images, 32, 32], and labels, int32 [images], from an NPZ file."""
    try:
        with np.load(path) as arrays:
            images, labels = arrays["image"], arrays["label"].astype(np.int32)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference must be an NPZ with image and label: {error}") from None
    if images.dtype != np.uint8 or images.shape != (*labels.shape, 32, 32):
        raise UserError("--reference must hold images, uint8 [images, 32, 32], and as many labels")
    return images, labels


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Computes numbers that describe each image; each value is [images]."""
    lit = images > 60
    around = np.stack([ndimage.uniform_filter(image, 3) for image in images.astype(float)])
    discs = find_discs(images)
    grays = ((0, 0), (1, 30), (31, 90), (91, 150), (151, 200), (201, 255))
    return {
        "mean": images.mean(axis=(1, 2)),
        "standard deviation": images.std(axis=(1, 2)),
        **{
            f"share of pixels in {low}..{high}": ((images >= low) & (images <= high)).mean((1, 2))
            for low, high in grays
        },
        "pixels above 60": lit.sum(axis=(1, 2)),
        "of these in the middle 16 x 16": lit[:, 8:-8, 8:-8].sum(axis=(1, 2)),
        "their connected components": np.array([ndimage.label(image)[1] for image in lit]),
        "their neighbours across": (lit[:, :, 1:] & lit[:, :, :-1]).sum(axis=(1, 2)),
        "their neighbours down": (lit[:, 1:] & lit[:, :-1]).sum(axis=(1, 2)),
        "their neighbours along \\": (lit[:, 1:, 1:] & lit[:, :-1, :-1]).sum(axis=(1, 2)),
        "their neighbours along /": (lit[:, 1:, :-1] & lit[:, :-1, 1:]).sum(axis=(1, 2)),
        "pixels of discs": (around > 90).sum(axis=(1, 2)),
        "distance of discs": np.hypot(*(discs[0] - discs[1])),
    }


def compare(original: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, Row]:
    """Computes mean, standard error and deviation of each statistic, and z of the difference."""
    table = {}
    for name in original:
        row = table[name] = {}
        for who, x in (("original", original[name]), ("ours", ours[name])):
            row[f"{who}_mean"] = float(np.mean(x))
            row[f"{who}_standard_error"] = float(np.std(x, ddof=1) / np.sqrt(len(x)))
            row[f"{who}_deviation"] = float(np.std(x, ddof=1))
        error = np.hypot(row["original_standard_error"], row["ours_standard_error"])
        row["z"] = float((row["ours_mean"] - row["original_mean"]) / error)
    return table


def draw_picture(
    sources: dict[str, Set], described: dict[str, dict[str, np.ndarray]], path: Path
) -> None:
    """Draws ten images of each label from each source, and histograms of some statistics."""
    names = ("mean", "pixels above 60", "their connected components")
    names = (*names, "pixels of discs", "distance of discs")
    figure = plt.figure(figsize=(15, 8.5), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(4, 1))
    rows = itertools.product(sources, (1, 0))
    for row, (who, label) in zip(above.subplots(4, 10), rows, strict=True):
        images, labels = sources[who]
        for axis, image in zip(row, images[labels == label], strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{who}, label {label}")
    for axis, name in zip(below.subplots(1, len(names)), names, strict=True):
        bins = np.histogram_bin_edges(np.concatenate([x[name] for x in described.values()]), 24)
        for who, x in described.items():
            axis.hist(x[name], bins, density=True, histtype="step", label=who)
        axis.set(title=name, yticks=[])
    axis.legend()
    figure.savefig(path, dpi=70, format="png")
    plt.close(figure)


class Network(nn.Module):
    """Residual blocks of 3 x 3 convolutions, on squares of 2 x 2 pixels."""

    width: int = 32
    blocks: int = 6

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, 2] of uint8 [batch, 32, 32]."""

        def norm_relu(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))

        x = images.reshape(-1, 16, 2, 16, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16, 4)
        x = nn.Conv(self.width, (3, 3))(x / 127.5 - 0.3)
        for _ in range(self.blocks):
            y = nn.Conv(self.width, (3, 3), use_bias=False)(norm_relu(x))
            x += nn.Conv(self.width, (3, 3), use_bias=False)(norm_relu(y))
        x = norm_relu(x)
        x = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
        return nn.Dense(2)(nn.relu(nn.Dense(64)(x)))


class State(TrainState):
    """Parameters, the optimizer's state, and the averages of batch normalisation."""

    batch_stats: Any


@jax.jit
def train_step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    """Takes one step; returns the next state and the accuracy on the batch."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(variables, images, True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (updated, (logits.argmax(-1) == labels).mean())

    gradients, (updated, accuracy) = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, **updated), accuracy


def train(sets: list[Set], num_steps: int) -> tuple[State, list[Row]]:
    """Trains a network on each of the sets in turn.

    Args:
      sets: sets of growing difficulty; the last one gets all remaining steps.
      num_steps: number of training steps.

    Returns:
      The trained state, and the number of steps and the training accuracy of each set.
    """
    network = Network()
    schedule = optax.cosine_onecycle_schedule(num_steps, _LEARNING_RATE, 0.05)
    state = State.create(
        apply_fn=network.apply,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3)),
        **network.init(jax.random.key(0), jnp.zeros((2, 32, 32), jnp.uint8), True),
    )
    rng = np.random.default_rng(0)
    history, accuracies = [], []
    for number in track(range(1, num_steps + 1), num_steps, "training", "steps"):
        images, labels = sets[len(history)]
        batch = rng.integers(len(images), size=_BATCH)
        turned = np.rot90(images[batch], rng.integers(4), (1, 2))
        turned = np.ascontiguousarray(turned[:, :, :: rng.choice((-1, 1))])
        state, accuracy = train_step(state, turned, labels[batch])
        accuracies.append(float(accuracy))
        recent = float(np.mean(accuracies[-_WINDOW:]))
        learned = len(accuracies) >= _WINDOW and recent > _GOOD and len(history) < len(sets) - 1
        if learned or number == num_steps:
            history.append({"steps": len(accuracies), "training_accuracy": recent})
            say(f"set {len(history)} of {len(sets)}: step {number}, accuracy {recent:.3f}")
            accuracies = []
    return state, history


def train_and_test(sets: list[Set], num_steps: int, held_out: Set, original: Set) -> Row:
    """Trains a network on our images; compares its accuracy on ours and on the original ones."""
    before = time.perf_counter()
    state, history = train(sets, num_steps)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    classify = jax.jit(lambda images: state.apply_fn(variables, images, False).argmax(-1))
    tests = {}
    for who, (images, labels) in (("ours", held_out), ("original", original)):
        mean = float((np.asarray(classify(images)) == labels).mean())
        error = float(np.sqrt(mean * (1 - mean) / len(labels)))
        tests[who] = {"accuracy": mean, "standard_error": error, "images": len(labels)}
    difference = tests["original"]["accuracy"] - tests["ours"]["accuracy"]
    error = np.hypot(*(test["standard_error"] for test in tests.values()))
    return {
        "seed": 0,
        "seconds": time.perf_counter() - before,
        "sets": history,
        **tests,
        "difference": difference,
        "difference_in_standard_errors": difference / float(error),
    }


def time_generation(size: int, difficulty: str, num_images: int) -> Row:
    """Measures the CPU time per image in one process, without that for making the tables."""
    seconds = []
    for count in (0, num_images):
        before = time.process_time()
        pathfinder.generate_chunk(size, difficulty, 0, 0, count)
        seconds.append(time.process_time() - before)
    each = seconds[1] / num_images
    return {
        "size": size,
        "difficulty": difficulty,
        "seconds_for_tables": seconds[0],
        "milliseconds_per_image": 1000 * each,
        "images_per_second_and_core": 1 / each,
        "minutes_for_200000_on_2_cores": 200_000 * each / 2 / 60,
    }


def main() -> None:
    """Runs all parts, and writes the JSON and the picture."""
    original, path = read_reference(_REFERENCE.value), Path(_OUT.value)
    sizes = _SMALL_SIZES if _SMALL.value else Sizes()
    timings = [
        time_generation(size, difficulty, sizes.timed)
        for size in pathfinder.SIZES
        for difficulty in pathfinder.DIFFICULTIES
    ]
    ours = pathfinder.generate(sizes.compared, seed=0)
    sources = {"original": original, "ours": ours}
    described = {
        who: {**statistics(images), "label": labels} for who, (images, labels) in sources.items()
    }
    with replacing(path.with_suffix(".png")) as part:
        draw_picture(sources, described, part)
    before = time.perf_counter()
    hard = pathfinder.settings(32, "hard")
    sets = [
        pathfinder.draw(hard._replace(target_dashes=dashes), (100, dashes), sizes.curriculum)
        for dashes in _CURRICULUM
    ]
    sets.append(pathfinder.generate(sizes.train, seed=101))
    held_out = pathfinder.generate(sizes.test, seed=102)
    drawing_seconds = time.perf_counter() - before
    result = {
        "what": "Pathfinder images of ours against those of the original generator, 32 pixels, "
        '"hard": statistics (z: difference of the means in standard errors), accuracy of a '
        "convolutional network trained on ours alone, and CPU time of ours",
        "data_source": f"original: {Path(_REFERENCE.value).name}, {len(original[1])} images made "
        "with github.com/drewlinsley/pathfinder; ours: skyformer_jax.data.pathfinder, seeds 0 "
        "(compared), 100 and 101 (training), 102 (test)",
        **provenance(1),
        "compared": {who: len(labels) for who, (_, labels) in sources.items()},
        "statistics": compare(**described),
        "training": {
            "dashes_of_targets": [*_CURRICULUM, pathfinder.DIFFICULTIES["hard"]],
            "images": [len(labels) for _, labels in sets],
            "goes_on_at_training_accuracy": _GOOD,
            "augmentation": "rotations by 90 degrees and reflections",
            "network": f"{Network.blocks} residual blocks of two 3 x 3 convolutions, "
            f"{Network.width} channels, batch normalisation",
            "optimizer": f"AdamW, one cycle up to {_LEARNING_RATE}, weight decay 0.001",
            "batch_size": _BATCH,
            "steps": sizes.steps,
            "seconds_to_draw_images": drawing_seconds,
        },
        "networks": [train_and_test(sets, sizes.steps, held_out, original)],
        "timings": timings,
    }
    write_json(path, result)


if __name__ == "__main__":
    cli.run(main)
