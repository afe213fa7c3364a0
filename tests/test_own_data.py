"""User-defined tasks, from tables to evaluation, and the documentation pages about them."""

import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import common
from skyformer_jax import prepare, tasks, training
from skyformer_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your_own_data.md").read_text()
CLASSES = ("bad", "good")
BOM = b"\xef\xbb\xbf"


def rows(seed, count):
    """Labels, and texts with all characters that a table may have to quote."""
    rng = np.random.default_rng(seed)
    pieces = ['"', "a film", ",", "caf\u00e9", "''", "\u4e2d", " "]
    texts = ["x" + "".join(rng.choice(pieces, rng.integers(1, 30))) for _ in range(count)]
    return [CLASSES[i] for i in rng.integers(0, 2, count)], texts


def write_tsv(path, labels, texts):
    lines = [f"{text}\t{label}" for label, text in zip(labels, texts, strict=True)]
    path.with_suffix(".tsv").write_bytes(BOM + "\r\n".join(["text\tlabel", *lines]).encode())


def write_csv(path, labels, texts):
    pairs = zip(labels, [text.replace('"', '""') for text in texts], strict=True)
    lines = [f'{i},"{text}",{label}' for i, (label, text) in enumerate(pairs)]
    path.with_suffix(".csv").write_bytes(BOM + "\n".join(["id,text,label", *lines]).encode())


def write_parquet(path, labels, texts):
    half = len(labels) // 2
    for i, part in enumerate((slice(None, half), slice(half, None))):
        table = pyarrow.table({"label": labels[part], "text": texts[part]})
        pyarrow.parquet.write_table(table, f"{path}-0000{i}-of-00002.parquet")


def write_npz(path, labels, texts):
    np.savez(path.with_suffix(".npz"), label=np.array(labels), text=np.array(texts))


WRITERS = {"tsv": write_tsv, "csv": write_csv, "parquet": write_parquet, "npz": write_npz}


def films(**changes):
    fields = {"inputs": "text", "classes": CLASSES, "max_length": 200}
    return tasks.define("films", **{**fields, **changes})


def load(task, data_dir, source, **options):
    return {s: list(task.load(s, data_dir, source=str(source), **options)) for s in tasks.SPLITS}


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_table_reads_the_same(tmp_path, form):
    expected = {}
    for i, split in enumerate(tasks.SPLITS):
        labels, texts = rows(i, 20 + i)
        WRITERS[form](tmp_path / split, labels, texts)
        expected[split] = [
            (text.encode(), CLASSES.index(label)) for label, text in zip(labels, texts, strict=True)
        ]
    found = load(films(), tmp_path / "data", tmp_path)
    assert expected == {
        split: [(bytes((e["tokens"] - 1).tolist()), e["label"]) for e in examples]
        for split, examples in found.items()
    }
    cut = load(films(), tmp_path / "data", tmp_path, length=3)["test"]
    assert [list(e["tokens"]) for e in cut] == [list(e["tokens"][:3]) for e in found["test"]]


def test_a_tenth_of_each_class_is_held_out_whatever_the_order(tmp_path):
    labels, texts = ["bad"] * 60 + ["good"] * 30, [f"text {i}" for i in range(90)]
    held_out = []
    for step in (1, -1):
        folder = tmp_path / str(step)
        folder.mkdir()
        write_tsv(folder / "train", labels[::step], texts[::step])
        write_tsv(folder / "test", *rows(1, 5))
        found = load(films(), folder / "data", folder)
        assert np.bincount([e["label"] for e in found["validation"]]).tolist() == [6, 3]
        assert len(found["train"]) == 81
        write_tsv(folder / "val", *rows(2, 5))  # with it, train would be larger
        with pytest.raises(UserError, match=r"made from test\.tsv, train\.tsv, and .* val\.tsv"):
            films().load("train", folder / "data", source=str(folder))
        held_out.append({str(e) for e in found["validation"]})
    assert held_out[0] == held_out[1]


def test_pixels_and_pairs(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 30, 4, 6), np.uint8)
    label = rng.integers(0, 3, 30)
    for split in tasks.SPLITS:
        np.savez(tmp_path / f"{split}.npz", pixels_1=images[0], pixels_2=images[1], label=label)
    pairs = tasks.define("pairs", inputs="pixels", classes=3, max_length=24, num_documents=2)
    for i, example in enumerate(load(pairs, tmp_path / "data", tmp_path)["test"]):
        assert example["label"] == label[i]
        np.testing.assert_array_equal(np.stack(example["tokens"]), images[:, i].reshape(2, 24))
    assert (pairs.vocab_size, pairs.num_classes, pairs.num_documents) == (256, 3, 2)
    examples = pairs.load("test", tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.shrink needs square images"):
        examples.shrunk(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"label\ttext\ngood\ta film\nfair\ta film\n", "example 2: the label 'fair' is not one of"),
        (b"label\ttext\ngood\t\n", "example 1: text is empty"),
        (b"label\ttext\ngood\ta\tb\n", ":2: 3 columns; the first line names 2: 'label', 'text'"),
        (b"label\ttext\n\ngood\n", ":3: 1 columns"),
        (b"good\ta film\n", "has no columns named text; its columns are: 'good', 'a film'"),
        (b"label\tlabel\n", ":1: two columns have the same name"),
        (b"label\ttext\n", "holds no examples"),
        (b"", "has no columns named text"),
        ("label\ttext\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (gzip.compress(b"label\ttext\ngood\ta film\n", mtime=0), "is compressed (gzip); unpack it"),
        (b"<!DOCTYPE html><title>403</title>", "is a web page"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, content, message):
    write_tsv(tmp_path / "test", *rows(0, 5))
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=f"train.tsv.*{re.escape(message)}"):
        films().load("train", tmp_path / "data", source=str(tmp_path))


def array_file(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def flipped_table():
    pyarrow.parquet.write_table(
        pyarrow.table({"label": [*CLASSES], "text": ["a", "b"]}),
        sink := pyarrow.BufferOutputStream(),
    )
    content = bytearray(sink.getvalue().to_pybytes())
    (length,) = struct.unpack("<I", content[-8:-4])
    content[len(content) - 8 - length : len(content) - length] = b"\xff" * 8
    return bytes(content)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_table_in_parts_is_read_whole_or_not_at_all(tmp_path, lost):
    """Interrupted downloads lack parts, and mixed versions have different numbers of parts."""
    for split in ("train", "test"):
        write_parquet(tmp_path / split, *rows(0, 40))
    assert len(load(films(), tmp_path / "data", tmp_path)["test"]) == 40
    part = tmp_path / f"train-0000{lost}-of-00002.parquet"
    part.rename(tmp_path / "train-00000-of-00001.parquet")
    for count in ("2 of 1 or 2", "1 of 2"):
        with pytest.raises(UserError, match=f"train in parts that are not whole: {count}, train-"):
            films().load("train", tmp_path / "again", source=str(tmp_path))
        (tmp_path / "train-00000-of-00001.parquet").unlink(missing_ok=True)


def test_images_of_all_splits_have_one_size(tmp_path):
    images = tasks.define("images", inputs="pixels", classes=np.int64(2), max_length=np.int64(16))
    assert json.loads(json.dumps(images.definition))["classes"] == 2
    for split, side in (("train", 4), ("test", 3)):
        pixels = np.zeros((40, side, side), np.uint8)
        np.savez(tmp_path / split, pixels=pixels, label=np.arange(40) % 2)
    with pytest.raises(
        UserError, match=r"images of test have .9. pixels, and those of train .16.;"
    ):
        images.load("train", tmp_path / "data", source=str(tmp_path))


def test_a_source_that_is_not_there_is_said(tmp_path, capsys):
    """Reports a missing source, except the one that the data set was made from."""
    (tmp_path / "here").mkdir()
    for split in ("train", "test"):
        write_tsv(tmp_path / "here" / split, *rows(0, 40))
    with pytest.raises(UserError, match=r"is not there, and the source .*there does not"):
        films().load("train", tmp_path / "data", source=str(tmp_path / "there"))
    films().load("train", tmp_path / "data", source=str(tmp_path / "here"))
    shutil.rmtree(tmp_path / "here")
    capsys.readouterr()
    films().load("test", tmp_path / "data", source=str(tmp_path / "here"))
    assert not capsys.readouterr().err
    for _ in range(2):
        films().load("test", tmp_path / "data", source=str(tmp_path / "there"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/there does not exist; reading the data set in ")
    assert line.endswith(f"made from {tmp_path}/here")


def test_files_that_are_no_tables_are_named(tmp_path):
    write_tsv(tmp_path / "test", *rows(0, 5))
    images = tasks.define("images", inputs="pixels", classes=2, max_length=16)
    good = {"label": np.zeros(3, int), "pixels": np.zeros((3, 4, 4), np.uint8)}
    for task, name, content, message in (
        (films(), "train.parquet", b"PAR1", "cannot be read as Parquet"),
        (films(), "train.npz", b"PK", "cannot be read as arrays of numpy.savez"),
        (films(), "train.csv", b'label,text\ngood,"a', "train.csv:2: "),
        (images, "train.npz", good | {"pixels": np.ones((3, 4, 4))}, "uint8 .* got float64"),
        (images, "train.npz", good | {"pixels": np.zeros((3, 4, 4, 3), np.uint8)}, "4, 4, 3"),
        (images, "train.npz", good | {"label": np.zeros(2, int)}, "different lengths: .2, 3"),
        (images, "train.npz", good | {"label": np.zeros((3, 2), int)}, "label '.0 0.'"),
        (images, "train.npz", good | {"label": np.full(3, 2)}, "label '2' is not one of: 0, 1"),
        (
            images,
            "train.npz",
            {"label": np.array([{}])},
            "numpy.savez: Object arrays",
        ),
        (images, "train.npz", good | {"label": np.int64(1)}, "different lengths: .1, 3"),
        (images, "train.npz", array_file(good["pixels"]), "it is one array, of numpy.save"),
        (films(), "train.parquet", flipped_table(), "cannot be read as Parquet: .* thrift"),
    ):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
        with pytest.raises(UserError, match=message):
            task.load("train", tmp_path / "data", source=str(tmp_path))
        path.unlink()
    for name in ("train.tsv", "train.csv"):
        (tmp_path / name).write_text("label\ttext\ngood\ta film\n")
    with pytest.raises(UserError, match=r"holds train 2 times: train\.tsv and train\.csv"):
        films().load("train", tmp_path / "data", source=str(tmp_path))
    with pytest.raises(UserError, match=r"does not hold test of task films; it holds .*; it must"):
        (tmp_path / "test.tsv").unlink()
        (tmp_path / "train.csv").unlink()
        films().load("train", tmp_path / "data", source=str(tmp_path))
    with pytest.raises(UserError, match=r"not prepared in .*data: name the folder of its files"):
        films().load("train", tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("listops", {}, "a task of this package is named 'listops'"),
        ("My films", {}, "lower-case letters"),
        ("films", {"inputs": "bytes"}, "unknown inputs of task films, 'bytes'"),
        ("films", {"classes": "good"}, "or different texts"),
        ("films", {"classes": 1}, "or different texts"),
        ("films", {"classes": ("a", "a")}, "or different texts"),
        ("films", {"classes": (0, 1)}, "or different texts"),
        ("films", {"classes": 2.0}, "or different texts"),
        ("films", {"max_length": 0}, "at least 1"),
        ("films", {"max_length": "9"}, "a whole number"),
        ("films", {"num_documents": 3}, "must be 1 or 2"),
    ],
)
def test_a_definition_that_cannot_be_meant_is_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        tasks.define(name, **{"inputs": "text", "classes": 2, "max_length": 9, **fields})


def test_another_definition_has_data_of_its_own(tmp_path):
    write_tsv(tmp_path / "train", *rows(0, 40))
    write_tsv(tmp_path / "test", *rows(1, 5))
    labels = [
        [e["label"] for e in load(films(classes=c), tmp_path / "data", tmp_path)["test"]]
        for c in (CLASSES, CLASSES[::-1])
    ]
    assert labels[0] == [1 - label for label in labels[1]]


@pytest.mark.slow
def test_a_run_needs_nothing_of_the_users_but_its_workdir_and_data(tmp_path, capsys):
    """Prepares data from a config, resumes an earlier checkpoint and reads the task's definition.

    The definition is in config.json.
    """
    source = tmp_path / "source"
    source.mkdir()
    write_tsv(source / "train", *rows(0, 40))
    write_csv(source / "test", *rows(1, 10))
    config = common.paper_config(films(), "softmax", max_length=200)
    config.data.update({"dir": str(tmp_path / "data"), "source": str(source)})
    config.model.update({"width": 16, "num_layers": 1, "mlp_dim": 16})
    config.train.update({"num_steps": 2, "warmup_steps": 0, "batch_size": 8, "eval_every": 1})
    prepare.main_of_config(config, None, None, "")
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["films", split, count]
        for split, count in zip(tasks.SPLITS, ("36", "4", "10"), strict=True)
    ]
    training.train(config, tmp_path / "run")
    whole = training.evaluate(tmp_path / "run", checkpoint="2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(source)
    training.train(config, tmp_path / "run")
    result = training.evaluate(tmp_path / "run", checkpoint="2")
    assert {**whole, "seconds": result["seconds"]} == result
    assert (result["task"], result["examples"], len(result["confusion"])) == ("films", 10, 2)
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "own_task": {**saved["own_task"], "classes": 2}}))
    with pytest.raises(UserError, match=r"another config.*own_task\.classes"):
        training.train(config, tmp_path / "run")
    path.write_text(json.dumps({**saved, "own_task": {**saved["own_task"], "colour": 1}}))
    with pytest.raises(UserError, match=r"unknown field own_task\. 'colour'"):
        training.evaluate(tmp_path / "run")


def write_files(page, home):
    """Writes a page's Python blocks to the paths that their first lines name."""
    for block in re.findall(r"```python\n(# ~/.*?)```", page, re.DOTALL):
        path = home / block.splitlines()[0].removeprefix("# ~/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)


@pytest.fixture
def reader(tmp_path):
    """A function that runs shell lines in an imitation of a clone, and its environment."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("train.py", "eval.py", "configs", "skyformer_jax", "checkpoints"):
        (clone / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": "",
    }

    def bash(lines):
        done = subprocess.run(
            ["bash", "-ec", lines], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return bash, environment


@pytest.mark.slow
def test_the_page_is_true_as_written(tmp_path, reader):
    (bash, environment), clone = reader, tmp_path / "clone"
    write_files(PAGE, tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    bash(commands)
    for split in ("validation", "test"):
        result = json.loads((clone / f"runs/films-skyformer/eval_{split}.json").read_text())
        assert result["accuracy"] > 0.9
    shutil.rmtree(tmp_path / "films")
    assert "films test, 400 examples" in bash("python eval.py --workdir=runs/films-skyformer")
    environment["PYTHONPATH"] = str(clone)
    bash("python ~/noise/noise.py; python train.py --config=$HOME/noise/noise.py")
    result = json.loads((clone / "runs/noise-skyformer/eval_test.json").read_text())
    assert result["examples"] == 100


@pytest.mark.slow
def test_the_page_on_fine_tuning_is_true_as_written(tmp_path, reader):
    bash, _ = reader
    for page in (PAGE, (ROOT / "docs" / "fine_tuning.md").read_text()):
        write_files(page, tmp_path)
    bash("python ~/films/make_films.py")
    (commands,) = re.findall(
        r"```bash\n(.*?)```", (ROOT / "docs" / "fine_tuning.md").read_text(), re.DOTALL
    )
    bash(commands)
    result = json.loads((tmp_path / "clone/runs/fine_tuned-skyformer/eval_test.json").read_text())
    assert result["accuracy"] > 0.9
