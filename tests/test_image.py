"""CIFAR-10's binary version, and gray levels against TensorFlow's."""

import tarfile
import zlib

import numpy as np
import pytest

from skyformer_jax.data import image
from skyformer_jax.errors import UserError

SIZES = {"train": 50, "test": 7}
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def make_folder(parent):
    """A small cifar-10-batches-bin, and by split its expected images and labels."""
    rng = np.random.default_rng(0)
    folder = parent / "cifar-10-batches-bin"
    folder.mkdir()
    expected = {}
    for split, names in (("train", BATCHES[:5]), ("test", BATCHES[5:])):
        size = SIZES[split]
        images = rng.integers(0, 256, (size, 3, 32, 32), np.uint8)
        labels = rng.integers(0, 10, size, np.uint8)
        expected[split] = images, labels
        for name, part in zip(names, np.split(np.arange(size), len(names)), strict=True):
            with (folder / name).open("wb") as file:
                for i in part:
                    file.write(bytes([labels[i]]) + images[i].tobytes())
    (folder / "batches.meta.txt").write_text("airplane\n")
    return folder, expected


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)[0]


def read(source):
    return image.read_cifar10(source, sizes=SIZES)


def test_reads_folder_and_archive(tmp_path):
    folder, expected = make_folder(tmp_path)
    archive = tmp_path / "elsewhere" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for source in (folder, tmp_path, archive, archive.parent):
        splits = read(source)
        assert list(splits) == ["train", "test"]
        for split, arrays in splits.items():
            for array, values in zip(arrays, expected[split], strict=True):
                np.testing.assert_array_equal(array, values)
                assert array.dtype == np.uint8
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is damaged or partly downloaded"):
        read(archive.parent)


def test_nothing_there_says_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match=r"nor cifar-10-batches-bin/ with .*cifar-10-binary.tar.gz"):
        read(tmp_path)


def test_a_missing_batch_is_named(folder):
    for name in BATCHES[2:4]:
        (folder / name).unlink()
    message = "is incomplete: it lacks data_batch_3.bin, data_batch_4.bin; unpack"
    with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize("size", [1, 3072, 3074, 30_729])
def test_a_cut_batch_is_named(folder, size):
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"{folder}: data_batch_2.bin has {size:,} bytes, not a"):
        read(folder)


def test_a_batch_cut_between_records_is_said(folder):
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-3073])
    with pytest.raises(UserError, match=r"is incomplete: 6 of 7 images in test; unpack"):
        read(folder)


@pytest.mark.parametrize("label", [10, 255])
def test_a_wrong_label_is_named(folder, label):
    path = folder / "data_batch_5.bin"
    content = bytearray(path.read_bytes())
    content[3 * 3073] = label
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data_batch_5.bin, record 4: the label {label} is not"):
        read(folder)


def test_gray_levels_are_tensorflows_for_all_colours():
    """Of all 2^24 colours, red slowest, tf.image.rgb_to_grayscale of TensorFlow 2.21 gives levels
    with this checksum.

    In exact arithmetic the level is the integer part of 255.5 / 255 times the weighted sum; float32
    falls on the other side of an integer for 237 of the colours.
    """
    levels = np.arange(256, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, -1)
    gray = image.to_gray(colours.reshape(3, -1, 32, 32).swapaxes(0, 1))
    assert gray.shape == (2**24 // 1024, 1024)
    assert gray.dtype == np.uint8
    assert zlib.crc32(gray) == 0xFBCAA583
    level = levels.astype(np.int32)
    weighted = 2989 * level[:, None, None] + 5870 * level[:, None] + 1140 * level
    differences = np.abs(gray.reshape(256, 256, 256) - 511 * weighted // (510 * 10_000))
    assert np.count_nonzero(differences) == 237
    assert differences.max() == 1


def test_gray_is_row_major_and_per_image():
    rgb = np.random.default_rng(1).integers(0, 256, (1500, 3, 4, 5), np.uint8)  # over a chunk
    gray = image.to_gray(rgb)
    assert gray.shape == (1500, 20)
    for i, row, column in ((0, 0, 0), (1023, 3, 4), (1024, 2, 1), (1499, 0, 4)):
        weighted = rgb[i, :, row, column] @ [0.2989, 0.587, 0.114]
        assert gray[i, 5 * row + column] == int(weighted * 255.5 / 255)
    assert image.to_gray(rgb[:0]).shape == (0, 20)
