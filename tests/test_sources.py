"""Which data are read: published or generated, and from which folder of a source."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import test_prepare
import test_text
import tiny_data

from configs import quickstart
from skyformer_jax import prepare, tasks, training
from skyformer_jax.data import archives, listops, pathfinder, retrieval
from skyformer_jax.errors import UserError
from skyformer_jax.training import config as configs
from skyformer_jax.training.workdir import with_kind

DEEPER = ("lra_release", "lra_release/lra_release")


def find_listops(source):
    return listops.find_files(source)["train"].parent


def find_pairs(source):
    return retrieval.find_files(source)["train"].parent


def find_images(source):
    return pathfinder.find_metadata(source, 8, "hard")[0].parents[2]


def write_images(folder):
    tiny_data.write_images(folder.parent, 8)


def write_trees(folder):
    folder.mkdir(parents=True)
    test_prepare.write_source(folder)


RELEASE = [
    pytest.param("listops-1000", write_trees, find_listops, id="listops"),
    pytest.param("tsv_data", tiny_data.write_pairs, find_pairs, id="retrieval"),
    pytest.param("pathfinder8", write_images, find_images, id="pathfinder"),
]


@pytest.mark.parametrize(("folder", "write", "find"), RELEASE)
def test_two_copies_in_a_source_are_refused_and_a_named_one_is_read(tmp_path, folder, write, find):
    copies = [tmp_path / release / folder for release in DEEPER]
    for copy in copies:
        write(copy)
    for source in (tmp_path, tmp_path / "lra_release"):
        with pytest.raises(UserError, match=f"holds 2 copies of {folder}.*; name the one") as error:
            find(source)
        assert str(copies[0]) + " and " + str(copies[1]) in str(error.value)
        assert not isinstance(error.value, archives.NotHereError)
    for copy in copies:
        assert find(copy) == copy
    assert find(copies[1].parent) == copies[1]
    with pytest.raises(archives.NotHereError):
        find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("folder", "write", "find"),
    [
        ("listops", write_trees, find_listops),
        ("aan", tiny_data.write_pairs, find_pairs),
        ("data/aan", tiny_data.write_pairs, find_pairs),  # as on the Hugging Face hub
        ("pathfinder/pathfinder8", write_images, find_images),
    ],
)
def test_the_layout_of_s4_is_known(tmp_path, folder, write, find):
    write(tmp_path / folder)
    assert find(tmp_path) == find(tmp_path / folder) == tmp_path / folder


@pytest.mark.parametrize("find", [find_listops, find_pairs, find_images])
def test_the_packed_release_is_named_for_what_it_is(tmp_path, find):
    """It is not reported as missing, since other examples would be generated in its place."""
    write_trees(tmp_path / "lra_release" / "lra_release" / "listops-1000")
    test_text.pack(tmp_path / "lra_release", tmp_path / "lra_release.gz")
    shutil.rmtree(tmp_path / "lra_release")
    for source in (tmp_path, tmp_path / "lra_release.gz"):
        with pytest.raises(UserError, match=r"gz is the packed release.*unpack it .tar -xzf") as e:
            find(source)
        assert not isinstance(e.value, archives.NotHereError)
    (tmp_path / "file.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(archives.NotHereError, match=r"file\.zip is a zip archive, but a folder"):
        find(tmp_path / "file.zip")


@pytest.mark.parametrize(("folder", "write", "find"), RELEASE[:2])
def test_files_that_are_not_what_their_names_say_are_named(tmp_path, folder, write, find):
    write(tmp_path / folder)
    path = min((tmp_path / folder).iterdir())
    content = path.read_text()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{path.name} is a pointer of Git LFS.*: run git lfs"):
        find(tmp_path)
    path.write_text(content, encoding="utf-16")
    with pytest.raises(UserError, match=rf"{path.name} is UTF-16 text; save it as UTF-8"):
        find(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    write_trees(tmp_path / "listops")
    tiny_data.write_pairs(tmp_path / "aan")
    write_images(tmp_path / "pathfinder8")

    def contents():
        trees = [listops.read_tsv(path) for path in listops.find_files(tmp_path).values()]
        pairs = [
            list(retrieval.read_pairs(path, tiny_data.PAIRS[split], report=pytest.fail))
            for split, path in retrieval.find_files(tmp_path).items()
        ]
        images = pathfinder.read_folder(tmp_path, 8, "hard", report=pytest.fail, workers=1)
        return str((trees, pairs, list(images)))

    before = contents()
    for path in (*tmp_path.rglob("*.tsv"), *tmp_path.rglob("*.npy")):
        path.write_bytes(archives.BYTE_ORDER_MARK + path.read_bytes())
    assert contents() == before


def test_data_that_the_machine_does_not_let_be_read_are_not_called_damaged(
    task, tmp_path, monkeypatch
):
    task.load("test", tmp_path)
    for error in (MemoryError(), OSError(24, "Too many open files")):
        source = mock.Mock(side_effect=error)
        monkeypatch.setattr(task.builder, "as_data_source", source)
        with pytest.raises(UserError, match=r"listops.* cannot be read: ") as caught:
            task.load("test", tmp_path)
        assert "delete" not in str(caught.value)


@pytest.mark.parametrize("name", ["source.json", "dataset_info.json"])
@pytest.mark.parametrize("source", [True, False])
def test_a_copy_that_is_not_whole_is_called_damaged(task, tmp_path, name, source):
    """An interrupted copy of a prepared data set has missing or truncated files."""
    write_trees(tmp_path / "listops-1000")
    where = {"source": str(tmp_path / "listops-1000")} if source else {}
    copy = tmp_path / "copy"
    place = Path(task.data_set(str(copy), **where).data_dir)
    place.mkdir(parents=True)
    for content in ("", '{"name": "x', None):
        if content is None:
            (place / name).unlink()
        else:
            (place / name).write_text(content)
        with pytest.raises(UserError, match=r"listops.* is damaged: .*; delete that folder"):
            task.load("test", str(copy), **where)


def test_a_link_to_a_folder_is_no_second_copy(tmp_path):
    write_trees(tmp_path / "lra_release" / "listops-1000")
    (tmp_path / "listops-1000").symlink_to(tmp_path / "lra_release" / "listops-1000")
    assert find_listops(tmp_path).name == "listops-1000"


def test_two_copies_are_not_made_up_for_by_generated_examples(tmp_path, monkeypatch):
    """Preparing all tasks fails for one with two copies, and for one with incomplete files."""
    for release in DEEPER:
        write_trees(tmp_path / release / "listops-1000")
    empty = tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata"
    empty.mkdir(parents=True)
    some = [tasks.get("listops"), tasks.get("pathfinder")]
    monkeypatch.setattr(tasks, "BENCHMARK", some)
    with pytest.raises(UserError, match=r"2 of 2 .* holds 2 copies .*metadata holds no files"):
        prepare.main("all", str(tmp_path / "data"), str(tmp_path))
    assert not (tmp_path / "data").exists()


@pytest.fixture
def task(monkeypatch):
    """Replaces listops_small by a tiny task that can be generated or read as published."""
    generated = tiny_data.tiny_tasks()["listops"].config
    both = dataclasses.replace(
        tasks.get("listops_small"), config=generated, source_config="official"
    )
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS | {both.name: both})
    return both


def test_what_is_prepared_is_read(task, tmp_path, capsys):
    """Reads published examples if only these are prepared, and generated ones if both are."""
    data_dir = str(tmp_path / "data")
    write_trees(tmp_path / "source")
    assert task.settled_kind(data_dir) == "generated"
    assert len(task.load("test", data_dir, source=str(tmp_path / "source"))) == 3
    capsys.readouterr()
    assert len(task.load("test", data_dir)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds published examples of listops_small, which are read" in line
    assert "--config.data.kind=generated" in line
    assert len(task.load("test", data_dir, kind="generated")) == 30
    capsys.readouterr()
    assert len(task.load("test", data_dir)) == 30
    (line,) = capsys.readouterr().err.splitlines()
    assert "generated and published examples of listops_small: the generated ones are" in line
    assert "--kind=published (prepare)" in line
    assert len(task.load("test", data_dir, kind="published")) == 3
    assert len(task.load("test", data_dir, source=str(tmp_path / "gone"))) == 3
    with pytest.raises(UserError, match=r"data\.kind=generated .* takes no data.source"):
        task.load("test", data_dir, source="any", kind="generated")
    with pytest.raises(UserError, match=r"unknown data\.kind .*did you mean 'published'"):
        task.load("test", data_dir, kind="publishd")
    with pytest.raises(UserError, match=r"unknown data\.kind of task text.* one of: published"):
        tasks.get("text").load("test", data_dir, kind="generated")


def test_a_run_reads_the_same_kind_whatever_is_prepared_since(task, tmp_path):
    data_dir = tmp_path / "data"
    write_trees(tmp_path / "source")
    prepare.main(task.name, str(data_dir), str(tmp_path / "source"))
    config = quickstart.get_config("softmax")
    config.data.dir = str(data_dir)
    config.model.update({"width": 16, "num_layers": 1, "mlp_dim": 16})
    config.train.update({"num_steps": 1, "warmup_steps": 0, "batch_size": 8, "eval_every": 1})
    result = training.train(config, tmp_path / "run")
    assert result["examples"] == 3 and "official" in result["data"]["name"]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["kind"] == "published"

    prepare.main(task.name, str(data_dir), None, "generated")
    assert with_kind(config, tmp_path / "run").data.kind == "published"
    assert with_kind(config, tmp_path / "other").data.kind == "generated"
    assert training.evaluate(tmp_path / "run")["data"] == result["data"]
    config.data.kind = "generated"
    with pytest.raises(UserError, match=r"data\.kind \(saved: 'published', asked for: 'generated'"):
        training.train(config, tmp_path / "run")
    # A run from before data.kind existed.
    del saved["data"]["kind"]
    for source, kind in (("", "generated"), (str(tmp_path / "source"), "published")):
        saved["data"]["source"] = source
        (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
        assert configs.read(tmp_path / "run" / "config.json").data.kind == kind
