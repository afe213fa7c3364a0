"""Our Pathfinder images against some of the original generator.

    python experiments/pathfinder_check.py --reference=originals.npz

Compares statistics of the images; draws some of both; trains a small convolutional network on ours
and tests it on both; times the generator. The reference holds the arrays image, uint8
[images, 32, 32], and label, of the original generator at "hard". Writes JSON with commit, versions
and hardware, and a picture beside it.
"""

import json
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import flags
from flax import linen as nn
from scipy import ndimage

from experiments.provenance import provenance, write_json
from skyformer_jax import cli
from skyformer_jax.data import pathfinder
from skyformer_jax.errors import UserError

_REFERENCE = flags.DEFINE_string("reference", None, "NPZ of original images.", required=True)
_OUT = flags.DEFINE_string(
    "out", "results/pathfinder_check.json", "JSON to write; the picture has .png."
)
_COMPARED = flags.DEFINE_integer("compared", 5000, "Images of ours compared.", lower_bound=20)
_TRAIN_IMAGES = flags.DEFINE_integer("train_images", 20_000, "To train on.", lower_bound=64)
_TEST_IMAGES = flags.DEFINE_integer("test_images", 4000, "Of ours to test on.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 2500, "Of training.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Networks trained.", lower_bound=1)
_TIMED = flags.DEFINE_integer("timed", 200, "Images timed of each kind.", lower_bound=1)

# Straight to "hard", the network stays at chance for long; so it begins with short targets.
_CURRICULUM = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12)  # dashes
_CURRICULUM_IMAGES = 5000  # of each
_GOOD = 0.8  # accuracy on the last _WINDOW batches with which it goes on to longer targets
_WINDOW = 40
_BATCH = 64
_LEARNING_RATE = 2e-3

Set = tuple[np.ndarray, np.ndarray]


def read_reference(path: str) -> Set:
    """Images, uint8 [images, 32, 32], and labels, int32 [images], of a file."""
    try:
        with np.load(path) as arrays:
            images, labels = arrays["image"], arrays["label"].astype(np.int32)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--reference must be an NPZ with arrays image and label: {error}"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32) or len(images) != len(labels):
        raise UserError(
            f"--reference must hold images, uint8 [images, 32, 32], and as many labels; got "
            f"{images.dtype} {list(images.shape)} and {len(labels)} labels"
        )
    return images, labels


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers that describe each image; each value is [images]."""
    lit = images > 60
    # Discs fill three by three pixels; little else does.
    around = np.stack([ndimage.uniform_filter(image, 3) for image in images.astype(float)])
    rows, cols = np.mgrid[:32, :32]
    remaining, discs = around.copy(), []
    for _ in range(2):
        disc = np.unravel_index(remaining.reshape(len(images), -1).argmax(axis=1), (32, 32))
        distance = np.hypot(rows - disc[0][:, None, None], cols - disc[1][:, None, None])
        remaining[distance <= 3] = 0
        discs.append(np.stack(disc))
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


def compare(
    original: dict[str, np.ndarray], ours: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Means, standard errors and deviations of each statistic, and z of the means' difference."""
    table = {}
    for name, values in original.items():
        row = {}
        for who, x in (("original", values), ("ours", ours[name])):
            row[f"{who}_mean"] = float(np.mean(x))
            row[f"{who}_standard_error"] = float(np.std(x, ddof=1) / np.sqrt(len(x)))
            row[f"{who}_deviation"] = float(np.std(x, ddof=1))
        error = np.hypot(row["original_standard_error"], row["ours_standard_error"])
        row["z"] = (row["ours_mean"] - row["original_mean"]) / float(error)
        table[name] = row
    return table


def draw_picture(original: Set, ours: Set, path: Path) -> None:
    """Ten images of each label from both, and histograms of some statistics."""
    figure, axes = plt.subplots(5, 10, figsize=(15, 8.5), layout="constrained")
    for who, (images, labels), rows in (
        ("original", original, axes[:2]),
        ("ours", ours, axes[2:4]),
    ):
        for label, row in zip((1, 0), rows, strict=True):
            for axis, image in zip(row, images[labels == label][:10], strict=False):
                axis.imshow(image, cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{who}, label {label}")
    grid = axes[4, 0].get_gridspec()
    for axis in axes[4]:
        axis.remove()
    values = statistics(original[0]), statistics(ours[0])
    names = (
        "mean",
        "pixels above 60",
        "their connected components",
        "pixels of discs",
        "distance of discs",
    )
    for i, name in enumerate(names):
        axis = figure.add_subplot(grid[4, 2 * i : 2 * i + 2])
        low, high = (f(f(x[name]) for x in values) for f in (min, max))
        for x, who in zip(values, ("original", "ours"), strict=True):
            bins = np.linspace(low, high, 25)
            axis.hist(x[name], bins, density=True, histtype="step", label=who)
        axis.set(title=name, yticks=[])
    axis.legend()
    figure.savefig(path, dpi=70)
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


def training_sets() -> list[Set]:
    """The curriculum's images, and last those at "hard"."""
    hard = pathfinder.settings(32, "hard")
    sets = [
        pathfinder.draw(hard._replace(target_dashes=dashes), (100, dashes), _CURRICULUM_IMAGES)
        for dashes in _CURRICULUM
    ]
    return [*sets, pathfinder.generate(_TRAIN_IMAGES.value, seed=101)]


def train(seed: int, sets: list[Set], report: Callable[[str], None]) -> tuple[Callable, list[dict]]:
    """Trains a network on each of the sets in turn.

    Args:
      seed: of the network and of the order of the images.
      sets: of growing difficulty; all steps that are left go to the last.
      report: called with lines of progress.

    Returns:
      A function from images to classes, and what happened on each set.
    """
    network = Network()
    variables = network.init(jax.random.key(seed), jnp.zeros((2, 32, 32), jnp.uint8), True)
    params, averages = variables["params"], variables["batch_stats"]
    schedule = optax.cosine_onecycle_schedule(_STEPS.value, _LEARNING_RATE, 0.05)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3)
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, averages: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple:
        def loss(params: Any) -> tuple[jax.Array, tuple]:
            logits, updated = network.apply(
                {"params": params, "batch_stats": averages}, images, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (updated["batch_stats"], (logits.argmax(-1) == labels).mean())

        (value, (new, accuracy)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, new_state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new, new_state, value, accuracy

    rng = np.random.default_rng(seed)
    history, accuracies, values = [], [], []
    start = time.perf_counter()
    for number in range(1, _STEPS.value + 1):
        images, labels = sets[len(history)]
        batch = rng.integers(len(images), size=_BATCH)
        turned = np.rot90(images[batch], rng.integers(4), (1, 2))
        turned = turned[:, :, :: rng.choice((-1, 1))]
        params, averages, state, value, accuracy = step(
            params, averages, state, np.ascontiguousarray(turned), labels[batch]
        )
        values.append(float(value))
        accuracies.append(float(accuracy))
        recent = float(np.mean(accuracies[-_WINDOW:]))
        if number % 100 == 0:
            report(
                f"step {number}, set {len(history) + 1} of {len(sets)}: loss "
                f"{np.mean(values[-100:]):.3f}, accuracy {np.mean(accuracies[-100:]):.3f}, "
                f"{time.perf_counter() - start:.0f} s"
            )
        learned = len(accuracies) >= _WINDOW and recent > _GOOD and len(history) < len(sets) - 1
        if learned or number == _STEPS.value:
            history.append({"steps": len(accuracies), "training_accuracy": recent})
            accuracies, values = [], []

    @jax.jit
    def classify(images: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": averages}
        return network.apply(variables, images, False).argmax(-1)

    return classify, history


def accuracy(classify: Callable, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy with its standard error."""
    classes = [
        np.asarray(classify(part)) for part in np.array_split(images, -(-len(images) // 250))
    ]
    mean = float((np.concatenate(classes) == labels).mean())
    return {
        "accuracy": mean,
        "standard_error": float(np.sqrt(mean * (1 - mean) / len(labels))),
        "images": len(labels),
    }


def time_generation() -> list[dict[str, Any]]:
    """CPU seconds of one process per image; the tables are made before."""
    rows = []
    for size in pathfinder.SIZES:
        for difficulty in pathfinder.DIFFICULTIES:
            before = time.process_time()
            pathfinder.generate_chunk(size, difficulty, 0, 0, 0)
            tables = time.process_time() - before
            before = time.process_time()
            pathfinder.generate_chunk(size, difficulty, 0, 0, _TIMED.value)
            seconds = (time.process_time() - before) / _TIMED.value
            rows.append(
                {
                    "size": size,
                    "difficulty": difficulty,
                    "seconds_for_tables": tables,
                    "milliseconds_per_image": 1000 * seconds,
                    "images_per_second_and_core": 1 / seconds,
                    "minutes_for_200000_on_2_cores": 200_000 * seconds / 2 / 60,
                }
            )
            print(
                f"{size:4} {difficulty:13}{1000 * seconds:8.2f} ms an image, 200,000 on 2 cores: "
                f"{rows[-1]['minutes_for_200000_on_2_cores']:.1f} minutes"
            )
    return rows


def main() -> None:
    """Runs all parts; writes the JSON and the picture, and prints the results."""
    original = read_reference(_REFERENCE.value)
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)

    timings = time_generation()
    ours = pathfinder.generate(_COMPARED.value, seed=0)
    compared = {**statistics(ours[0]), "label": ours[1]}
    table = compare({**statistics(original[0]), "label": original[1]}, compared)
    for name, row in table.items():
        print(
            f"{name:32}"
            f"   original {row['original_mean']:9.4f} +- {row['original_standard_error']:.4f}"
            f"   ours {row['ours_mean']:9.4f} +- {row['ours_standard_error']:.4f}"
            f"   z {row['z']:+.2f}"
        )
    draw_picture(original, ours, path.with_suffix(".png"))

    before = time.perf_counter()
    sets = training_sets()
    held_out = pathfinder.generate(_TEST_IMAGES.value, seed=102)
    drawing_seconds = time.perf_counter() - before
    networks = []
    for seed in range(_SEEDS.value):
        before = time.perf_counter()
        classify, history = train(seed, sets, lambda line, seed=seed: print(f"seed {seed}, {line}"))
        tests = {
            who: accuracy(classify, *images)
            for who, images in (("ours", held_out), ("original", original))
        }
        difference = tests["original"]["accuracy"] - tests["ours"]["accuracy"]
        error = np.hypot(*(test["standard_error"] for test in tests.values()))
        networks.append(
            {
                "seed": seed,
                "seconds": time.perf_counter() - before,
                "sets": history,
                **tests,
                "difference": difference,
                "difference_in_standard_errors": difference / float(error),
            }
        )
        print(f"seed {seed}: {json.dumps(networks[-1])}")
    result = {
        "what": "Pathfinder images of ours against those of the original generator, 32 pixels, "
        '"hard": statistics (z: difference of the means in standard errors), accuracy of a '
        "convolutional network trained on ours alone, and CPU time of ours",
        "data_source": f"original: {Path(_REFERENCE.value).name}, {len(original[1])} images made "
        "with github.com/drewlinsley/pathfinder; ours: skyformer_jax.data.pathfinder, seeds 0 "
        "(compared), 100 and 101 (training), 102 (test)",
        **provenance(1),
        "compared": {"original": len(original[1]), "ours": len(ours[1])},
        "statistics": table,
        "training": {
            "dashes_of_targets": [*_CURRICULUM, pathfinder.DIFFICULTIES["hard"]],
            "images": [len(labels) for _, labels in sets],
            "goes_on_at_training_accuracy": _GOOD,
            "augmentation": "rotations by 90 degrees and reflections",
            "network": f"{Network.blocks} residual blocks of two 3 x 3 convolutions, "
            f"{Network.width} channels, batch normalisation",
            "optimizer": f"AdamW, one cycle up to {_LEARNING_RATE}, weight decay 0.001",
            "batch_size": _BATCH,
            "steps": _STEPS.value,
            "seconds_to_draw_images": drawing_seconds,
        },
        "networks": networks,
        "timings": timings,
    }
    write_json(path, result)


if __name__ == "__main__":
    cli.run(main)
