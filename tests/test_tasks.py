"""The six tasks, from published files through stored examples to the model's inputs."""

import collections
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
import test_image
import test_text
import tiny_data
from PIL import Image

from skyformer_jax import prepare, tasks
from skyformer_jax.data import image, parallel, pathfinder, retrieval, splits, store, text
from skyformer_jax.data.pathfinder import generator
from skyformer_jax.errors import UserError
from skyformer_jax.tasks import SPLITS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_data.write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "num_cores", lambda: 1)  # worker processes have their own test
        tiny_data.load_all(tiny_data.tiny_tasks(), source, folder)
    return folder


@pytest.fixture
def tiny():
    return tiny_data.tiny_tasks()


def all_of(task, data_dir, source, **options):
    return {
        split: list(task.load(split, data_dir, source=str(source), **options)) for split in SPLITS
    }


def test_text_is_bytes_and_validation_is_held_out(tiny, data_dir, source):
    published = text.read_reviews(source, sizes=test_text.SIZES, report=pytest.fail)
    ours = all_of(tiny["text"], data_dir, source)
    assert {split: len(examples) for split, examples in ours.items()} == {
        **{"train": 30, "validation": 10},
        "test": 20,
    }
    assert collections.Counter(e["label"] for e in ours["validation"]) == {0: 5, 1: 5}
    for splits_of_ours, split in ((("train", "validation"), "train"), (("test",), "test")):
        stored = {
            bytes((e["tokens"] - 1).tolist()): e["label"] for s in splits_of_ours for e in ours[s]
        }
        assert stored == dict(zip(published[split][0], published[split][1].tolist(), strict=True))
    shorter = all_of(tiny["text"], data_dir, source, length=30)
    for split in SPLITS:
        for whole, cut in zip(ours[split], shorter[split], strict=True):
            np.testing.assert_array_equal(cut["tokens"], whole["tokens"][:30])


def test_the_published_validation_of_text_is_its_test(tiny, data_dir, source):
    right = all_of(tiny["text"], data_dir, source)
    paper = all_of(tiny["text"], data_dir, source, validate_on_test=True)
    assert str(paper["validation"]) == str(paper["test"]) == str(right["test"])
    assert str(paper["train"]) == str(right["train"] + right["validation"])


def test_image_is_gray_and_black_is_real(tiny, data_dir, source):
    published = image.read_cifar10(source, sizes=test_image.SIZES)
    ours = all_of(tiny["image"], data_dir, source)
    assert [len(ours[split]) for split in SPLITS] == [40, 10, 7]
    stored = {tuple(e["tokens"]): e["label"] for e in ours["train"] + ours["validation"]}
    rgb, labels = published["train"]
    expected = {tuple(gray): int(y) for gray, y in zip(image.to_gray(rgb), labels, strict=True)}
    assert stored == expected
    examples = tiny["image"].load("train", data_dir, source=str(source))
    assert (examples.lengths == 1024).all() and examples.tokenizer.offset == 0
    half = tiny["image"].load("train", data_dir, source=str(source), shrink=2)
    assert (half.lengths == 256).all()


def test_retrieval_keeps_pairs_and_the_first_4000_bytes(tiny, data_dir, source):
    task = tiny["retrieval"]
    for split, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
        path = source / "lra_release" / "tsv_data" / f"new_aan_pairs.{name}.tsv"
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        examples = task.load(split, data_dir, source=str(source))
        for example, row in zip(examples, rows, strict=True):
            assert example["label"] == float(row[0])
            for tokens, document in zip(example["tokens"], row[3:], strict=True):
                assert list(tokens) == [byte + 1 for byte in document.encode()[:4000]]


def test_retrieval_is_stored_in_pieces_of_one_stream(tiny, data_dir, source, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval.Retrieval, "_PAIRS_A_FILE", 10)  # divides train's 30
    task = tiny["retrieval"]
    for split in SPLITS:
        expected = task.load(split, data_dir, source=str(source)).checksum()
        assert task.load(split, tmp_path / "data", source=str(source)).checksum() == expected
    assert len(list((tmp_path / "data").rglob("*-train.array_record*"))) == 3
    tiny_data.write_pairs(tmp_path / "longer")
    with (tmp_path / "longer" / "new_aan_pairs.train.tsv").open("a") as file:
        file.write("1.0\tA\tB\tone more\tpair\n")
    with pytest.raises(UserError, match=r"31 of 30 pairs"):
        task.load("train", tmp_path / "other", source=str(tmp_path / "longer"))


@pytest.mark.parametrize(("name", "size"), [("pathfinder", 32), ("pathx", 128)])
def test_pathfinder_is_divided_by_names(tiny, data_dir, source, name, size):
    folder = source / "lra_release" / f"pathfinder{size}"
    expected = {split: set() for split in SPLITS}
    for block, i in itertools.product(range(2), range(tiny_data.IMAGES // 2)):
        file = f"curv_contour_length_14/imgs/{block}/sample_{i}.png"
        with Image.open(folder / file) as picture:
            expected[splits.split_by_name(file)].add((picture.tobytes(), i % 2))
    for split in SPLITS:
        examples = tiny[name].load(split, data_dir, source=str(source))
        stored = {(e["tokens"].astype(np.uint8).tobytes(), e["label"]) for e in examples}
        assert stored == expected[split]
        assert (examples.lengths == size**2).all()
    assert not list(data_dir.glob("pathfinder/blocks*"))


def test_the_source_and_its_form_do_not_change_the_data(tiny, data_dir, source, tmp_path):
    """A folder, archives, archives in data_dir and TFDS's prepared data give equal checksums."""

    def checksums(task, data_dir, source):
        return [task.load(split, data_dir, source=source).checksum() for split in SPLITS]

    archives = tmp_path / "archives"
    archives.mkdir()
    test_text.pack(source / "aclImdb", archives / "aclImdb_v1.tar.gz")
    test_text.pack(source / "cifar-10-batches-bin", archives / "cifar-10-binary.tar.gz")
    reviews = text.read_reviews(source, sizes=test_text.SIZES, report=pytest.fail)
    photographs = image.read_cifar10(source, sizes=test_image.SIZES)
    tfds_dir = tmp_path / "tfds"
    prepare_by_tfds(tfds_dir, reviews, photographs)
    for name in ("text", "image"):
        expected = checksums(tiny[name], data_dir, str(source))
        for i, place in enumerate((archives, tfds_dir)):
            assert checksums(tiny[name], tmp_path / str(i), str(place)) == expected
        assert checksums(tiny[name], archives, None) == expected


class ImdbReviews(tfds.core.GeneratorBasedBuilder):
    """Stores arrays in the form of TFDS's own imdb_reviews builder."""

    VERSION = tfds.core.Version("1.0.0")
    name = "imdb_reviews"
    examples = None

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["neg", "pos"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._rows(*rows) for split, rows in self.examples.items()}

    def _rows(self, texts, labels):
        for i, (review, label) in enumerate(zip(texts, labels, strict=True)):
            yield i, {"text": review, "label": int(label)}

    def _generate_examples(self):
        raise NotImplementedError


class Cifar10(ImdbReviews):
    """Stores arrays in the form of TFDS's own cifar10 builder."""

    name = "cifar10"

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _rows(self, images, labels):
        for i, (rgb, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(rgb.transpose(1, 2, 0)).save(file, "PNG")
            file.seek(0)
            yield i, {"id": str(i), "image": file, "label": int(label)}


def prepare_by_tfds(folder, reviews, photographs):
    for builder_class, examples in ((ImdbReviews, reviews), (Cifar10, photographs)):
        builder = builder_class(data_dir=folder, file_format="array_record")
        builder.examples = examples
        builder.download_and_prepare()


def test_another_source_is_refused(tiny, data_dir, source, tmp_path):
    other, _ = test_image.make_folder(tmp_path)
    batch = other / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"another data_batch_3\.bin .* name another data\.dir"):
        tiny["image"].load("test", data_dir, source=str(other))
    with pytest.raises(UserError, match="nowhere does not exist"):
        tiny["image"].load("test", tmp_path / "data", source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="it has: length, validate_on_test"):
        tiny["text"].load("test", data_dir, shrink=2)
    with pytest.raises(UserError, match=r"download of OpenNLPLab/lra .* failed: .*new_aan_pairs"):
        tiny["retrieval"].load("test", tmp_path / "none")


@pytest.fixture
def server(tmp_path):
    """Serves a folder on 127.0.0.1; yields the folder, its address and the requested paths."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(tmp_path / "served"), **options)

        def log_message(self, *arguments):
            asked.append(self.path)

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def test_the_archive_is_downloaded_and_checked(tiny, server, tmp_path, monkeypatch, data_dir):
    folder, address, asked = server
    made, _ = test_text.make_folder(tmp_path)
    archive = test_text.pack(made, folder / "aclImdb_v1.tar.gz")
    url = f"{address}/{archive.name}"
    info = tfds.download.checksums.UrlInfo(
        size=archive.stat().st_size,
        checksum=hashlib.sha256(archive.read_bytes()).hexdigest(),
        filename=archive.name,
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(text.Text, "URL", url)
    monkeypatch.setattr(text.Text, "url_infos", {url: info})
    task = tiny["text"]
    expected = task.load("train", data_dir).checksum()
    assert task.load("train", tmp_path / "data").checksum() == expected
    assert asked.count(f"/{archive.name}") == 1

    wrong = dataclasses.replace(info, checksum=hashlib.sha256(b"").hexdigest())
    monkeypatch.setattr(text.Text, "url_infos", {url: wrong})
    with pytest.raises(UserError, match=r"download of .* failed: .*put aclImdb/ or aclImdb_v1"):
        task.load("train", tmp_path / "other")
    assert not list((tmp_path / "other").glob("text/tiny/1*"))


def test_without_a_network_it_is_said_what_to_put_where(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(image.Image, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .*cifar-10-batches-bin/ or ") as error:
        tiny["image"].load("train", tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 30


def test_published_urls_have_checksums():
    for builder in (text.Text, image.Image):
        assert len(builder.url_infos[builder.URL].checksum) == 64


def tiny_generated(num_images):
    config = pathfinder.PathfinderConfig(name="tiny_generated", num_images=num_images)
    return dataclasses.replace(tasks.get("pathfinder"), config=config)


def test_generated_pathfinder_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    monkeypatch.setattr(generator, "CHUNK", 25)
    images, labels = pathfinder.generate(60, workers=1)
    task = tiny_generated(60)
    draw, drawn = pathfinder.generate_chunk, []

    def interrupted(size, difficulty, seed, chunk, count):
        if chunk == 2 and len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(chunk)
        return draw(size, difficulty, seed, chunk, count)

    monkeypatch.setattr(generator, "generate_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.load("train", tmp_path)
    drawn.append("again")
    loaded = {split: task.load(split, tmp_path) for split in SPLITS}
    assert drawn == [0, 1, "again", 2]
    assert "2 of 3 blocks of images are there already" in capsys.readouterr().err
    stored = sorted(
        (e["tokens"].astype(np.uint8).tobytes(), e["label"])
        for examples in loaded.values()
        for e in examples
    )
    expected = [(x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)]
    assert stored == sorted(expected)
    assert len(loaded["train"]) > len(loaded["validation"])


def _prepare_here(data_dir):
    store.prepare(tiny_data.tiny_tasks()["listops"].data_set(data_dir))


def test_two_preparations_at_once_make_one_data_set(tmp_path):
    task = tiny_data.tiny_tasks()["listops"]
    waiting = task.data_set(str(tmp_path))  # its turn comes after the others have made it
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_prepare_here, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [len(task.load(split, tmp_path)) for split in SPLITS] == [60, 20, 30]
    assert [len(store.load(waiting, split)) for split in SPLITS] == [60, 20, 30]
    assert not list(tmp_path.glob("listops/tiny/incomplete*"))


def test_what_was_odd_is_kept_with_the_data(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    tiny_data.write_images(tmp_path, 32)
    empty = tmp_path / "pathfinder32/curv_contour_length_14/imgs/1/sample_7.png"
    empty.write_bytes(b"")
    task = tiny["pathfinder"]
    total = sum(len(task.load(s, tmp_path / "data", source=str(tmp_path))) for s in SPLITS)
    assert total == tiny_data.IMAGES - 1
    described = store.describe(task.data_set(tmp_path / "data", source=str(tmp_path)))
    assert described["source"] == tmp_path.name
    (note,) = described["notes"]
    assert "skipped 1 of" in note and "sample_7.png" in note and "empty" in note
    json.dumps(described)


def test_prepare_all(tiny, source, data_dir, tmp_path, monkeypatch, capsys):
    """Prints a table of all six tasks; an unavailable task does not stop the others."""
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    benchmark = [tiny[task.name] for task in tasks.BENCHMARK]
    monkeypatch.setattr(tasks, "BENCHMARK", benchmark)
    prepare.main("all", str(data_dir), str(source))
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["task", "split", "examples"]
    assert [tuple(row.split()[:2]) for row in rows] == [
        (task.name, split) for task in benchmark for split in SPLITS
    ]
    assert all(len(row.split()[-1]) == 16 for row in rows)
    (source_without := tmp_path / "source").mkdir()
    test_text.make_folder(source_without)
    some = [tiny[name] for name in ("listops", "text", "retrieval")]
    monkeypatch.setattr(tasks, "BENCHMARK", some)
    with pytest.raises(UserError, match=r"1 of 3 tasks failed: retrieval: the download of"):
        prepare.main("all", str(tmp_path / "data"), str(source_without))
    rows = capsys.readouterr().out.splitlines()[1:]
    assert {row.split()[0] for row in rows} == {"listops", "text"}
    with pytest.raises(UserError, match="does not exist"):
        prepare.main("all", str(tmp_path / "data"), str(tmp_path / "nowhere"))
