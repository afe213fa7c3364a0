"""IMDB reviews from folders, archives and tables as published, intact and damaged."""

import csv
import dataclasses
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from skyformer_jax import tasks
from skyformer_jax.data import archives, held_out, text
from skyformer_jax.errors import UserError

SIZES = {"train": 40, "test": 20}
ARCHIVE = "aclImdb_v1.tar.gz"


def make_folder(parent):
    """Writes a small aclImdb; returns it and each split's texts and labels in order."""
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
    (folder / "train" / "pos" / "._0_9.txt").write_bytes(b"\0")  # such as macOS leaves
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
        assert archives.find(tmp_path, text.FORMS) == archive
        assert_is(read(tmp_path), expected)
    else:
        assert archives.find(tmp_path, text.FORMS) is None


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
    # An uncompressed archive ends in zeros, which may be missing.
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
    with pytest.raises(UserError, match=rf"{ARCHIVE} is a web page, not .*; download that again"):
        read(archive)


def write_tables(folder, expected, form, names, labels):
    """Writes the reviews as tables in the forms that others publish."""
    folder.mkdir()
    for split, (texts, classes) in expected.items():
        rows = [
            (f" {body.decode()}\n", labels[label])
            for body, label in zip(texts, classes, strict=True)
        ]
        if form == "csv":
            with (folder / f"{split}.csv").open("w", encoding="utf-8-sig", newline="") as file:
                csv.writer(file).writerows([names, *rows])
        else:
            columns = map(list, zip(*rows, strict=True))
            table = pyarrow.table(dict(zip(names, columns, strict=True)))
            pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


TABLES = pytest.mark.parametrize(
    ("form", "names", "labels"),
    [
        ("csv", ("review", "sentiment"), ("negative", "positive")),
        ("csv", ("text", "label"), (0, 1)),
        ("parquet", ("text", "label"), (0, 1)),
    ],
)


@pytest.fixture
def tiny_text():
    config = held_out.HeldOutConfig(name="tiny", sizes=tuple(SIZES.values()), num_validation=10)
    return dataclasses.replace(tasks.get("text"), config=config, source_config=config)


@TABLES
def test_tables_give_the_data_of_the_folder(tmp_path, tiny_text, form, names, labels):
    _, expected = make_folder(tmp_path)
    write_tables(tmp_path / "tables", expected, form, names, labels)
    unlabelled = pyarrow.table({"text": ["no label"], "label": [-1]})
    pyarrow.parquet.write_table(unlabelled, tmp_path / "tables" / "unsupervised.parquet")
    for split in tasks.SPLITS:
        ours, theirs = (
            tiny_text.load(split, tmp_path / name / "data", source=str(tmp_path / name))
            for name in ("aclImdb", "tables")
        )
        assert ours.checksum() == theirs.checksum()
    data_dir = tmp_path / "tables" / "data"
    shutil.move(data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "tables")
    expected["train"][0][0] += b" altered"
    write_tables(tmp_path / "tables", expected, form, names, labels)
    with pytest.raises(UserError, match=r"made from another train"):
        tiny_text.load("test", tmp_path / "data", source=str(tmp_path / "tables"))


def test_tables_that_are_not_as_published_are_refused(tmp_path, tiny_text):
    _, expected = make_folder(tmp_path)
    texts, labels = expected["train"]
    for name, changed, message in (
        ("fewer", (texts[1:], labels[1:]), "is incomplete: 39 of 40 examples in train"),
        ("flipped", (texts, [1, *labels[1:]]), "is incomplete: 19 of 20 reviews that are neg"),
        (
            "unlabelled",
            (texts, [2, *labels[1:]]),
            "example 1: the label '-1' is not one of",
        ),
        ("empty", ([b"", *texts[1:]], labels), "example 1: the review is empty"),
    ):
        tables = {"train": changed, "test": expected["test"]}
        write_tables(tmp_path / name, tables, "csv", ("text", "label"), (0, 1, -1))
        with pytest.raises(UserError, match=rf"train\.csv.*{message}"):
            tiny_text.load("train", tmp_path / "data", source=str(tmp_path / name))
    (tmp_path / "one").mkdir()
    (tmp_path / "fewer" / "train.csv").rename(tmp_path / "one" / "IMDB Dataset.csv")
    with pytest.raises(UserError, match=r"IMDB Dataset\.csv does not say which .* are train and"):
        tiny_text.load("train", tmp_path / "data", source=str(tmp_path / "one"))
    assert tiny_text.is_in(str(tmp_path / "one"))
    assert not tasks.get("image").is_in(str(tmp_path / "flipped"))


def test_a_byte_order_mark_is_no_part_of_a_review(tmp_path):
    folder, expected = make_folder(tmp_path)
    (file,) = (folder / "test" / "pos").glob("3_*")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_is(read(tmp_path), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", r"is a zip archive, not an archive of aclImdb: unpack it, and name its"),
        (b"PAR1", r"is a table, not .*: name its folder, which must hold one for train and one"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            r"is a pointer of Git LFS.*lfs pull",
        ),
        (b"<!DOCTYPE html>", r"is a web page, not an archive of aclImdb"),
        (b"\x80\x04K\x01.", r"is a pickle of Python, not an archive of aclImdb: name its folder"),
    ],
)
def test_a_file_that_is_no_archive_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(archives.NotHereError, match=message):
        read(tmp_path / "file")


def test_an_archive_of_something_else_is_named_for_what_it_is(tmp_path):
    (tmp_path / "lra_release").mkdir()
    packed = pack(tmp_path / "lra_release", tmp_path / "lra_release.gz")
    with pytest.raises(archives.NotHereError, match=r"is the packed release of the Long"):
        read(packed)
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match=r"or another archive: it holds none of IMDB's reviews"):
        read(pack(tmp_path / "else", tmp_path / "else.tar"))
    nested = tmp_path / "nested"
    nested.mkdir()
    _, expected = make_folder(nested)
    assert_is(read(pack(nested, tmp_path / "nested.tar")), expected)


FLOORS = """
import numpy as np
from experiments.data import text_floors
from skyformer_jax.data.examples import Examples

rng = np.random.default_rng(0)
texts = [rng.integers(0, 256, rng.integers(20, 60), np.uint8) for _ in range(60)]
label = np.array([(text < 128).mean() > 0.5 for text in texts]).astype(np.int32)
starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
examples, shuffled = (
    Examples(np.concatenate(parts), starts, label)
    for parts in (texts, [rng.permutation(text) for text in texts])
)
features = text_floors.frequencies(examples, (), 1)
np.testing.assert_array_equal(text_floors.frequencies(shuffled, (), 1), features)
np.testing.assert_allclose(features.sum(axis=1), 1, rtol=1e-5)
weights = text_floors.fit(100 * features, label, 1e-4)
assert text_floors.accuracy(weights, 100 * features, label) == 1

both, of_shuffled = (text_floors.frequencies(x, (2, 3), 50) for x in (examples, shuffled))
np.testing.assert_array_equal(both[:, :256], features)
np.testing.assert_allclose(both.sum(axis=1), 3, rtol=1e-5)
assert (both[:, 256:] != of_shuffled[:, 256:]).mean() > 0.2
"""


@pytest.mark.slow
def test_floors_of_text_count_bytes_and_ngrams_and_find_what_separates():
    """Runs in a process of its own, since each script of experiments defines its flags."""
    subprocess.run([sys.executable, "-c", FLOORS], check=True)
