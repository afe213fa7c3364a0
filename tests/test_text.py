"""IMDB reviews from folders and archives in the published layout, whole and damaged."""

import shutil
import tarfile

import numpy as np
import pytest

from skyformer_jax.data import archives, text
from skyformer_jax.errors import UserError

SIZES = {"train": 40, "test": 20}
ARCHIVE = "aclImdb_v1.tar.gz"


def make_folder(parent):
    """A small aclImdb, and by split its expected texts and labels in order."""
    rng = np.random.default_rng(0)
    folder = parent / "aclImdb"
    expected = {}
    for split, size in SIZES.items():
        texts = []
        for name, ratings in (("neg", (1, 2, 3, 4)), ("pos", (7, 8, 9, 10))):
            (folder / split / name).mkdir(parents=True)
            for number in rng.permutation(size // 2):
                body = b"%s %s %d: " % (split.encode(), name.encode(), number)
                body += rng.bytes(200).hex().encode() + b"<br />"
                file = folder / split / name / f"{number}_{rng.choice(ratings)}.txt"
                file.write_bytes(b" " + body + b"\n")
                texts.append((name, number, body))
        texts.sort()
        labels = [int(name == "pos") for name, _, _ in texts]
        expected[split] = [body for _, _, body in texts], labels
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_text("not labelled")
    (folder / "train" / "urls_pos.txt").write_text(
        "http://www.imdb.com/title/tt0453418/usercomments"
    )
    (folder / "train" / "pos" / "._0_9.txt").write_bytes(b"\0")  # as macOS leaves them
    (folder / "imdb.vocab").write_text("the\nand\n")
    return folder, expected


def pack(folder, archive, mode="w:gz"):
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, folder.name)
    return archive


def read(source, report=pytest.fail):
    return text.read_reviews(source, sizes=SIZES, report=report)


def assert_is(splits, expected):
    assert list(splits) == list(expected) == ["train", "test"]
    for split, (texts, labels) in splits.items():
        assert (texts, labels.tolist()) == expected[split]
        assert labels.dtype == np.uint8


@pytest.mark.parametrize("below", ["", "aclImdb"])
def test_reads_a_folder_in_order(tmp_path, below):
    _, expected = make_folder(tmp_path)
    assert_is(read(tmp_path / below), expected)
    assert expected["train"][1] == [0] * 20 + [1] * 20
    assert expected["test"][0][9].startswith(b"test neg 9: ")


@pytest.mark.parametrize(
    ("name", "mode"), [(ARCHIVE, "w:gz"), ("any.tar.xz", "w:xz"), ("x.bz2", "w:bz2"), ("t", "w")]
)
def test_an_archive_reads_as_its_folder(tmp_path, name, mode):
    folder, expected = make_folder(tmp_path)
    archive = pack(folder, tmp_path / name, mode)
    assert_is(read(archive), expected)
    shutil.rmtree(folder)
    if name == ARCHIVE:
        assert archives.find(tmp_path, text.PUBLISHED) == archive
        assert_is(read(tmp_path), expected)
    else:
        assert archives.find(tmp_path, text.PUBLISHED) is None


def test_nothing_there_says_what_is_wanted(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"does not hold train/pos .* nor aclImdb_v1.tar.gz or"):
            read(source)


def test_bytes_that_are_not_utf8_are_kept_and_counted(tmp_path):
    folder, expected = make_folder(tmp_path)
    latin = "caf\u00e9".encode("latin-1")
    (file,) = (folder / "test" / "pos").glob("3_*")
    file.write_bytes(latin + b"\n")
    expected["test"][0][13] = latin
    said = []
    assert_is(read(tmp_path, said.append), expected)
    assert said == [f"{folder}: 1 of 20 reviews of test are not UTF-8; their bytes are kept"]


@pytest.mark.parametrize("rating", [0, 5, 6, 7, 11])
def test_a_flipped_label_is_refused(tmp_path, rating):
    folder, _ = make_folder(tmp_path)
    (file,) = (folder / "train" / "neg").glob("7_*")
    file.rename(file.with_name(f"7_{rating}.txt"))
    message = rf"aclImdb: train/neg/7_{rating}.txt has rating {rating}, .* neg are 1 to 4"
    with pytest.raises(UserError, match=message):
        read(folder)
    with pytest.raises(UserError, match=f"train/neg/7_{rating}.txt"):
        read(pack(folder, tmp_path / ARCHIVE))


def test_missing_and_empty_reviews_are_refused(tmp_path):
    folder, _ = make_folder(tmp_path)
    (file,) = (folder / "train" / "neg").glob("7_*")
    file.write_bytes(b" \n")
    with pytest.raises(UserError, match=rf"{folder}: train/neg/{file.name} is empty"):
        read(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"is incomplete: 19 of 20 reviews in train/neg; unpack"):
        read(tmp_path)
    file.write_bytes(b"fine")
    (folder / "test" / "pos" / "99_8.txt").write_bytes(b"one more")
    with pytest.raises(UserError, match=r"is not as published: 11 of 10 reviews in test/pos"):
        read(tmp_path)


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    folder, _ = make_folder(tmp_path)
    (file,) = (folder / "train" / "neg").glob("7_*")
    file.unlink()
    file.symlink_to(tmp_path / "anything")
    with pytest.raises(UserError, match=r"is incomplete: 19 of 20 reviews in train/neg"):
        read(pack(folder, tmp_path / ARCHIVE))


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2", "w"])
def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path, mode):
    archive = pack(make_folder(tmp_path)[0], tmp_path / "whole", mode)
    content = archive.read_bytes()
    # An uncompressed one ends in zeros, which may go.
    cuts = [0, 1, 10, 300, *range(1000, len(content) - 20_000, 5000)]
    if mode != "w":
        cuts += [len(content) - 20, len(content) - 5, len(content) - 1]
    for cut in cuts:
        archive.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"whole is (damaged or partly downloaded|incomplete)"):
            read(archive)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_an_archive_with_altered_bytes_is_refused(tmp_path, mode):
    archive = pack(make_folder(tmp_path)[0], tmp_path / ARCHIVE, mode)
    content = archive.read_bytes()
    for place in range(100, len(content) - 8, len(content) // 9):
        altered = bytearray(content)
        altered[place] ^= 0x55
        archive.write_bytes(altered)
        with pytest.raises(UserError, match=rf"{ARCHIVE} is damaged or partly .*download it again"):
            read(archive)
    archive.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(UserError, match=rf"{ARCHIVE} is damaged"):
        read(archive)
