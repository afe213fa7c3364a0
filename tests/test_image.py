"""CIFAR-10 in its binary, Python and Parquet versions, and gray levels against TensorFlow's."""

import dataclasses
import io
import os
import pickle
import shutil
import tarfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from skyformer_jax import tasks
from skyformer_jax.data import held_out, image
from skyformer_jax.errors import UserError

SIZES = {"train": 50, "test": 7}
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def make_folder(parent):
    """Writes a small cifar-10-batches-bin; returns it and each split's images and labels."""
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


def test_copies_of_a_batch_and_links_to_nothing_are_named(folder):
    copy = folder / "copy" / "data_batch_2.bin"
    copy.parent.mkdir()
    shutil.copy(folder / copy.name, copy)
    first = read(folder)["train"][0]
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"two copies of data_batch_2\.bin, which differ: copy/"):
        read(folder)
    copy.unlink()
    copy.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"copy/data_batch_2\.bin is a link to a file that is not"):
        read(folder)
    copy.unlink()
    np.testing.assert_array_equal(read(folder)["train"][0], first)


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
    """Compares with the checksum of tf.image.rgb_to_grayscale (TensorFlow 2.21).

    The checksum is over all 2^24 colours, with red varying slowest.

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
    rgb = np.random.default_rng(1).integers(0, 256, (1500, 3, 4, 5), np.uint8)  # over 1 chunk
    gray = image.to_gray(rgb)
    assert gray.shape == (1500, 20)
    for i, row, column in ((0, 0, 0), (1023, 3, 4), (1024, 2, 1), (1499, 0, 4)):
        weighted = rgb[i, :, row, column] @ [0.2989, 0.587, 0.114]
        assert gray[i, 5 * row + column] == int(weighted * 255.5 / 255)
    assert image.to_gray(rgb[:0]).shape == (0, 20)


def pickled_by_python_2(pixels, labels):
    """Pickles a batch byte for byte as in the Python version: protocol 2, written by Python 2."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89"
    array += b"T" + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb"
    fields = text(b"batch_label") + text(b"testing batch 1 of 1") + text(b"data") + array
    fields += text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + fields + b"u."


def make_python_folder(parent):
    """Writes a small cifar-10-batches-py with the same content as make_folder's."""
    binary, expected = make_folder(parent)
    folder = parent / "cifar-10-batches-py"
    folder.mkdir()
    for name in BATCHES:
        records = np.fromfile(binary / name, np.uint8).reshape(-1, 3073)
        batch = pickled_by_python_2(records[:, 1:], records[:, 0])
        (folder / name.removesuffix(".bin")).write_bytes(batch)
    (folder / "batches.meta").write_bytes(b"\x80\x02}.")
    (folder / "readme.html").write_text("<html>")
    shutil.rmtree(binary)
    return folder, expected


def assert_is(splits, expected):
    for split, arrays in expected.items():
        for array, values in zip(splits[split], arrays, strict=True):
            np.testing.assert_array_equal(array, values)
            assert array.dtype == np.uint8


def test_the_python_version_reads_as_the_binary_one(tmp_path):
    folder, expected = make_python_folder(tmp_path)
    archive = tmp_path / "packed" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.copytree(folder, tmp_path / "s4" / "cifar" / folder.name)
    for source in (folder, tmp_path, archive, archive.parent, tmp_path / "s4"):
        assert_is(read(source), expected)
    for name, protocol in (("data_batch_2", 2), ("data_batch_3", 4)):  # repickled by Python 3
        batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        if protocol == 4:
            batch = {key.decode(): value for key, value in batch.items()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    assert_is(read(folder), expected)
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"is incomplete: it lacks data_batch_4; unpack"):
        read(folder)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Harmful()), "UnpicklingError it names posix.system"),
        (pickle.dumps({"data": Harmful(), "labels": [1]}), "it names posix.system"),
        (pickle.dumps(print), "it names builtins.print"),
        (pickle.dumps({"labels": [1]}), "KeyError b'data'"),
        (pickle.dumps([1, 2]), "AttributeError"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "pixels are float64"),
        (pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [1]}), r"are uint8 \[2, 3\]"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}), "labels are"),
        (b"\x80\x02}(", "EOFError"),
        (b"<html>", "UnpicklingError"),
    ],
)
def test_pickles_that_are_no_batches_are_refused_and_do_nothing(
    tmp_path, content, reason, monkeypatch
):
    folder, _ = make_python_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match=rf"data_batch_1 is no batch of .* whole: .*{reason}"):
        read(folder)
    assert not (tmp_path / "harmed").exists()


def test_a_wrong_label_of_the_python_version_is_named(tmp_path):
    folder, _ = make_python_folder(tmp_path)
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": [0, 10] * 5}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(UserError, match="data_batch_1, record 2: the label 10 is not one of"):
        read(folder)


def test_tables_of_images_give_the_data_of_the_folder(tmp_path):
    """The tables have the Hugging Face hub's form: PNG bytes with file names."""
    make_folder(tmp_path)
    config = held_out.HeldOutConfig(name="tiny", sizes=tuple(SIZES.values()), num_validation=10)
    task = dataclasses.replace(tasks.get("image"), config=config, source_config=config)
    tables = tmp_path / "tables" / "plain_text"
    tables.mkdir(parents=True)
    for split, (images, labels) in read(tmp_path).items():
        files = []
        for i, pixels in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": f"{i}.png"})
        table = pyarrow.table({"img": files, "label": labels.astype(np.int64)})
        pyarrow.parquet.write_table(table, tables / f"{split}-00000-of-00001.parquet")
    for split in tasks.SPLITS:
        ours, theirs = (
            task.load(split, tmp_path / name, source=str(source))
            for name, source in (("ours", tmp_path), ("theirs", tables.parent))
        )
        assert ours.checksum() == theirs.checksum()
