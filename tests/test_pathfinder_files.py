"""Reads a miniature of Pathfinder's release: PNGs with metadata, intact and damaged."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from skyformer_jax.data.pathfinder import reader
from skyformer_jax.errors import UserError

SIZE, FOLDER = 8, "curv_contour_length_14"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def columns(block, i, label):
    return f"imgs/{block} sample_{i}.png {i} {label} 1.0 14 4 2 0.5 1 0.75".split()


def make_release(parent, counts):
    """Writes blocks with counts[number] images; returns the folder and the expected content.

    The content is a list of (names, images, labels), one entry per block.
    """
    rng = np.random.default_rng(0)
    folder = parent / f"pathfinder{SIZE}" / FOLDER
    (folder / "metadata").mkdir(parents=True)
    expected = []
    for block, count in counts.items():
        (folder / "imgs" / str(block)).mkdir(parents=True)
        images = rng.integers(0, 256, (count, SIZE, SIZE), np.uint8)
        labels = rng.integers(0, 2, count)
        lines = [" ".join(columns(block, i, label)) + "\n" for i, label in enumerate(labels)]
        (folder / "metadata" / f"{block}.npy").write_text("".join(lines))
        for i, pixels in enumerate(images):
            (folder / "imgs" / str(block) / f"sample_{i}.png").write_bytes(png(pixels))
        names = [f"{FOLDER}/imgs/{block}/sample_{i}.png" for i in range(count)]
        expected.append((names, images.reshape(count, -1), labels))
    return folder, expected


def read(source, report=pytest.fail, workers=1):
    return list(reader.read_folder(source, SIZE, "hard", report=report, workers=workers))


def assert_is(blocks, expected):
    for (names, images, labels), (true_names, true_images, true_labels) in zip(
        blocks, expected, strict=True
    ):
        assert names == true_names
        np.testing.assert_array_equal(images, true_images)
        np.testing.assert_array_equal(labels, true_labels)
        assert images.dtype == labels.dtype == np.uint8


@pytest.mark.parametrize("place", ["", "lra_release", "lra_release/lra_release"])
def test_reads_the_release_in_the_order_of_numbers(tmp_path, place):
    folder, expected = make_release(tmp_path / place, {0: 5, 2: 3, 10: 4})
    (folder / "metadata" / "._0.npy").write_bytes(b"\0")  # such as macOS leaves
    assert_is(read(tmp_path), expected)
    assert_is(read(folder.parent), expected)


def test_each_difficulty_has_its_folder(tmp_path):
    """The names are those of LRA's release."""
    folder, ((names, images, labels),) = make_release(tmp_path, {0: 5})
    for difficulty, name in (("easy", "curv_baseline"), ("intermediate", "curv_contour_length_9")):
        with pytest.raises(UserError, match=name):
            reader.find_metadata(tmp_path, SIZE, difficulty)
        shutil.copytree(folder, folder.parent / name)
        found = list(reader.read_folder(tmp_path, SIZE, difficulty, report=pytest.fail, workers=1))
        assert_is(found, [([x.replace(FOLDER, name) for x in names], images, labels)])


def test_processes_read_the_same(tmp_path):
    folder, expected = make_release(tmp_path, {i: 4 for i in range(12)})
    path = folder / "metadata" / "11.npy"
    path.write_text(path.read_text().replace("14 4", "14"))
    blocks = reader.read_folder(tmp_path, SIZE, "hard", report=pytest.fail, workers=2)
    assert_is([next(blocks) for _ in range(11)], expected[:11])
    with pytest.raises(UserError, match=r"metadata/11.npy:1: expected 11 columns, got 10"):
        next(blocks)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_metadata_may_truly_be_numpys(tmp_path, kind):
    folder, expected = make_release(tmp_path, {3: 6})
    rows = [columns(3, i, label) for i, label in enumerate(expected[0][2])]
    np.save(folder / "metadata" / "3.npy", np.array(rows).astype(kind))
    assert_is(read(tmp_path), expected)


def test_nothing_there_says_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match=rf"not hold {FOLDER}/metadata, nor does pathfinder8/ in"):
        read(tmp_path)
    (tmp_path / FOLDER / "metadata").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metadata holds no files 0.npy"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imgs/0 sample_1.png 1", ":2: expected 11 columns, got 3; unpack"),
        ("", ":2: expected 11 columns, got 0"),
        ("imgs/0 sample_1.png 1 2 1.0 14 4 2 0.5 1 1", ":2: the label '2' is not 0 or 1"),
        ("imgs/0 sample_1.png 1 1.0 14 4 2 0.5 1 1 1", ":2: the label '1.0' is not 0 or 1"),
        ("imgs/0 sample_1.png 1 \u0661 1.0 14 4 2 0.5 1 1", ":2: the label '\u0661' is not"),
    ],
)
def test_malformed_metadata_is_named(tmp_path, line, message):
    folder, _ = make_release(tmp_path, {0: 3})
    path = folder / "metadata" / "0.npy"
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"metadata/0.npy{message}"):
        read(tmp_path)


def npy(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not metadata"),
        (b"\x93NUMPY", "is not metadata"),
        (npy(np.array([["a" * 9] * 11] * 3))[:-5], "is not metadata"),
        (npy(np.zeros((3, 11))), r"is not metadata \(an array of float64 \[3, 11\], not of text"),
        (npy(np.array(["imgs/0 sample_1.png"])), "is not metadata"),
        (npy(np.array([["a", 1]], object), allow_pickle=True), r"is not metadata \(Object arrays"),
        (npy(np.zeros((0, 11), "U1")), "is empty"),
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path, content, message):
    folder, _ = make_release(tmp_path, {0: 3})
    (folder / "metadata" / "0.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"metadata/0.npy {message}"):
        read(tmp_path)


def test_images_that_cannot_be_read_are_skipped_and_reported(tmp_path):
    folder, expected = make_release(tmp_path, {0: 150, 1: 250})
    images = folder / "imgs" / "1"
    cut = (images / "sample_70.png").read_bytes()
    (images / "sample_5.png").write_bytes(b"")
    (images / "sample_70.png").write_bytes(cut[: len(cut) // 2])
    (images / "sample_249.png").unlink()
    (folder / "imgs" / "0" / "sample_3.png").write_bytes(b"<html>")
    said = []
    blocks = read(tmp_path, said.append)
    for i, skipped in enumerate(([3], [5, 70, 249])):
        names, pixels, labels = expected[i]
        names = [name for j, name in enumerate(names) if j not in skipped]
        expected[i] = names, np.delete(pixels, skipped, axis=0), np.delete(labels, skipped)
    assert_is(blocks, expected)
    metadata = folder / "metadata"
    assert said == [
        f"skipped 1 of 150 images of {metadata}/0.npy: imgs/0/sample_3.png (not a PNG)",
        f"skipped 3 of 250 images of {metadata}/1.npy: imgs/1/sample_5.png (empty file), "
        "imgs/1/sample_70.png (image file is truncated), imgs/1/sample_249.png (missing)",
    ]


def test_too_many_skipped_is_an_error_at_the_end(tmp_path):
    folder, _ = make_release(tmp_path, {0: 150, 1: 9, 2: 41})
    shutil.rmtree(folder / "imgs" / "1")
    said = []
    blocks = reader.read_folder(tmp_path, SIZE, "hard", report=said.append, workers=1)
    assert [len(next(blocks)[0]) for _ in range(3)] == [150, 0, 41]
    with pytest.raises(UserError, match=r"9 of 200 images cannot be read, more than 1%: partly"):
        next(blocks)
    assert said[0].endswith("imgs/1/sample_4.png (missing) and 4 more")


def test_images_without_metadata_are_reported(tmp_path):
    folder, expected = make_release(tmp_path, {0: 4, 1: 4, 2: 4})
    (folder / "metadata" / "1.npy").unlink()
    said = []
    assert_is(read(tmp_path, said.append), expected[::2])
    assert said == [
        f"left out 1 of 3 folders of images that have no file in {folder / 'metadata'}: imgs/1"
    ]


def test_no_damaged_png_gives_other_pixels(tmp_path):
    folder, expected = make_release(tmp_path, {0: 1})
    path = folder / "imgs" / "0" / "sample_0.png"
    content = path.read_bytes()
    damaged = [content[:i] for i in range(len(content))]
    damaged += [
        content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :] for i in range(len(content))
    ]
    unread = 0
    for content in damaged:
        path.write_bytes(content)
        block = reader.read_block(folder, folder / "metadata" / "0.npy", SIZE)
        unread += len(block.skipped)
        np.testing.assert_array_equal(block.images, expected[0][1][: len(block.names)])
    assert unread > 0.7 * len(damaged)  # the rest are damaged only after the pixels


def test_gray_images_may_be_stored_as_colours_and_others_are_refused(tmp_path):
    folder, expected = make_release(tmp_path, {0: 4})
    path = folder / "imgs" / "0" / "sample_2.png"
    pixels = expected[0][1][2].reshape(SIZE, SIZE)
    colours = np.stack([pixels] * 3, axis=-1)
    path.write_bytes(png(colours))
    assert_is(read(tmp_path), expected)
    for other, message in (
        (colours[:, :7], "7 x 8 in mode L"),
        (pixels[:7], "8 x 7 in mode L"),
        (colours + np.arange(3, dtype=np.uint8), "8 x 8 in mode RGB"),
        (pixels.astype(np.uint16), "8 x 8 in mode I;16"),
        (pixels > 128, "8 x 8 in mode 1"),
        (np.concatenate([colours, colours[..., :1]], axis=-1), "8 x 8 in mode RGBA"),
    ):
        path.write_bytes(png(other))
        with pytest.raises(UserError, match=rf"sample_2.png is an image of {message}; expected 8"):
            read(tmp_path)
