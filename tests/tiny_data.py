"""The six benchmark tasks in miniature: small files in the published formats, and tasks."""

import dataclasses
import io

import numpy as np
import test_image
import test_text
from PIL import Image

from skyformer_jax import tasks
from skyformer_jax.data import held_out, listops, pathfinder, retrieval
from skyformer_jax.data.examples import Examples


def from_sequences(sequences, labels):
    """Makes Examples of one document each from uint8 arrays."""
    lengths = [len(sequence) for sequence in sequences]
    return Examples(
        np.concatenate([np.zeros(0, np.uint8), *sequences]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        np.asarray(labels, np.int32),
    )


PAIRS = {"train": 30, "validation": 8, "test": 12}
IMAGES = 100  # of each size of Pathfinder


def write_pairs(folder):
    """Writes new_aan_pairs.*.tsv with documents of 1 to 300 bytes, and some of up to 5,000."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
        with (folder / f"new_aan_pairs.{name}.tsv").open("w") as file:
            for i in range(PAIRS[split]):
                lengths = rng.integers(1, 300, 2) if i % 5 else (5000, 4000)
                texts = ["".join(rng.choice(list("abcd e"), n - 1)) + "." for n in lengths]
                file.write("\t".join([f"{i % 2}.0", f"A{i}", f"B{i}", *texts]) + "\n")


def write_images(folder, size):
    """Writes pathfinderSIZE/curv_contour_length_14 with IMAGES noise images in two blocks."""
    rng = np.random.default_rng(size)
    folder = folder / f"pathfinder{size}" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for block in range(2):
        (folder / "imgs" / str(block)).mkdir(parents=True)
        lines = []
        for i in range(IMAGES // 2):
            pixels = rng.integers(0, 2, (size, size), np.uint8) * rng.integers(0, 256)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG", compress_level=1)
            (folder / "imgs" / str(block) / f"sample_{i}.png").write_bytes(file.getvalue())
            lines.append(f"imgs/{block} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1\n")
        (folder / "metadata" / f"{block}.npy").write_text("".join(lines))


def write_sources(folder):
    """Writes the published files of all tasks but ListOps into a folder."""
    test_text.make_folder(folder)
    test_image.make_folder(folder)
    write_pairs(folder / "lra_release" / "tsv_data")
    for size in (32, 128):
        write_images(folder / "lra_release", size)


def tiny_tasks():
    """The benchmark's tasks by name, with the sizes that write_sources writes."""
    grammar = listops.Grammar(min_length=4, max_length=48, max_depth=4, max_args=5)
    sizes = {
        "listops": listops.ListopsConfig(name="tiny", grammar=grammar, sizes=(60, 20, 30)),
        "text": held_out.HeldOutConfig(
            name="tiny", sizes=tuple(test_text.SIZES.values()), num_validation=10
        ),
        "image": held_out.HeldOutConfig(
            name="tiny", sizes=tuple(test_image.SIZES.values()), num_validation=10
        ),
        "retrieval": retrieval.RetrievalConfig(name="tiny", sizes=tuple(PAIRS.values())),
        "pathfinder": pathfinder.PathfinderConfig(name="tiny_32", size=32, num_images=None),
        "pathx": pathfinder.PathfinderConfig(name="tiny_128", size=128, num_images=None),
    }
    tiny = {}
    for task in tasks.BENCHMARK:
        source_config = None if task.name == "listops" else sizes[task.name]
        tiny[task.name] = dataclasses.replace(
            task, config=sizes[task.name], source_config=source_config
        )
    for name in ("listops", "pathfinder", "pathx"):
        tiny[f"{name}_small"] = dataclasses.replace(
            tiny[name],
            name=f"{name}_small",
            max_length=tasks.get(f"{name}_small").max_length,
        )
    for name in ("pathfinder_easy", "pathfinder_intermediate"):
        tiny[name] = dataclasses.replace(tiny["pathfinder"], name=name)
    short = pathfinder.PathfinderConfig(name="tiny_short", difficulty="short", num_images=60)
    tiny["pathfinder_short"] = dataclasses.replace(tasks.get("pathfinder_short"), config=short)
    return tiny


def load_all(tiny, source, data_dir):
    """Prepares all tasks of a dict from tiny_tasks."""
    for task in tiny.values():
        task.load("test", data_dir, source=str(source) if task.source_config else None)
