"""The configs of the six tasks: their settings, and that each trains with every attention."""

import importlib
import itertools
import json
import shutil
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tiny_data
from run_on import run_on

from configs import common
from skyformer_jax import attention, tasks, training
from skyformer_jax.attention import registry
from skyformer_jax.data import parallel
from skyformer_jax.errors import UserError
from skyformer_jax.training import config, results
from skyformer_jax.training.step import tokens_and_mask

NAMES = [task.name for task in tasks.BENCHMARK]
VARIANTS = ("", *common.VARIANTS)
ADDED = {
    "text": ("fast", "ngrams"),
    "listops": ("fast",),
    "image": ("fast",),
    "pathfinder": ("fast",),
}  # variants that the others lack


def get(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def test_the_settings_are_the_papers():
    """Checks batch size, peak learning rate, warm-up, padded length and validation interval."""
    table = {
        "text": (16, 1e-4, 80, 4096, 500),
        "listops": (32, 1e-4, 1000, 2048, 500),
        "retrieval": (16, 2e-4, 800, 4096, 1000),
        "pathfinder": (128, 2e-4, 312, 1024, 500),
        "image": (256, 1e-4, 175, 1024, 50),
    }
    for name, expected in table.items():
        settings = get(name)
        train = settings.train
        assert expected == (
            *(train.batch_size, train.learning_rate, train.warmup_steps),
            *(settings.model.max_length, train.eval_every),
        )
        assert train.num_steps == 50_000
        assert settings.model.to_dict() | {"dropout": 0.1, "num_layers": 2, "width": 64} == (
            settings.model.to_dict()
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_variant_restores_the_published_options(name):
    settings = get(name, "performer,paper")
    assert settings.attention.scale == 1 / 32
    assert settings.model.pooling == "padded_mean"
    assert "scale" not in get(name, "skyformer,paper").attention
    assert get(name, "bigbird,paper").attention.global_blocks == "first_last"
    assert get(name, "bigbird").attention.global_blocks == "first"
    assert "scale" not in get(name, "performer").attention


@pytest.mark.parametrize("name", NAMES)
def test_all_attentions_and_variants_pass_the_check(name):
    variants = (*VARIANTS, *ADDED.get(name, ()))
    for attention_name, variant in itertools.product(attention.NAMES, variants):
        settings = get(name, f"{attention_name},{variant}")
        config.check(settings, num_devices=1)
        assert settings.attention.name == attention_name
    with pytest.raises(UserError, match="did you mean 'small'"):
        get(name, "skyformer,smal")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_a_data_sheet(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    for word in ("Data:", "Floor", "--config=configs/", 'Variant "paper"', "small"):
        assert word in text


def test_bad_training_fields_are_named():
    for fields, message in (
        ({"train.accumulation": 3}, "16 is not divisible by the 2 devices times .*=3; .* 18"),
        ({"train.accumulation": -1}, "train.accumulation must be a number of microbatches, or 0"),
        ({"train.log_every": 0}, "train.log_every must be at least 1"),
        ({"num_seeds": 0}, "num_seeds must be at least 1"),
        ({"seed": -1}, "seed must be in 0"),
        ({"data.buckets": (512,), "model.pooling": "padded_mean"}, "padded_mean divides by"),
        (
            {"data.drop_below": 1, "model.positions": "rotary"},
            "other model.positions than rotary",
        ),
        ({"data.drop_below": 256}, "drop_below must be in 0..255; got 256"),
        (
            {"train.curriculum": ("pathfinder",), "train.curriculum_steps": (9,)},
            "unknown task in train.curriculum 'pathfinder'; choose one of: text",
        ),
        (
            {"train.curriculum": ("text", "text"), "train.curriculum_steps": (9, 9)},
            r"curriculum_steps must .* ascending order; got \(9, 9\) for \('text', 'text'\)",
        ),
        ({"train.curriculum_steps": (9,)}, r"got \(9,\) for \(\)"),
        ({"train.sample_steps": 9}, "sample_steps needs train.sample_length.* in 1..4095.*; got 0"),
        ({"train.sample_length": 9}, "sample_length=9 needs train.sample_steps, .*or both to 0"),
        ({"train.sample_steps": -1}, "sample_steps must be at least 0; got -1"),
        (
            {"train.sample_steps": 9, "train.sample_length": 9, "model.positions": "rotary"},
            "sample_steps needs model.pooling=mean, no model.ngrams, and other model.positions "
            "than rotary",
        ),
        ({"model.positions": "axial", "model.max_length": 4097}, "axial: .*square number.*4097"),
        ({"model.positions": "sinusoidal_2d", "model.width": 6}, "divisible by 4 .*_2d; got 6"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16'.*float32, bfloat16"),
        ({"attention.implementation": "flash"}, "auto, dense, chunked"),
    ):
        settings = get("text", "kernelized")
        settings.update_from_flattened_dict(fields)
        with pytest.raises(UserError, match=message):
            config.check(settings, num_devices=2)


def test_a_run_of_reformer_from_before_an_option_keeps_what_it_had(tmp_path):
    """Earlier runs used scale=None, which is 1/sqrt(head_dim), and did not factorize hashes."""
    stored = config.stored(get("listops", "reformer,small"))
    now, before = {"scale": 1, "factorize_hash": True}, {"scale": None, "factorize_hash": False}
    path = tmp_path / "config.json"
    for left_out in ((), ("factorize_hash",), ("scale", "factorize_hash")):
        for option in left_out:
            stored["attention"].pop(option, None)
        path.write_text(json.dumps(stored))
        read = config.read(path)
        expected = now | {option: before[option] for option in left_out}
        assert {option: read.attention[option] for option in now} == expected
        config.check(read, 1)


def test_a_run_that_left_out_zeros_still_does(tmp_path):
    """Earlier versions had data.drop_zeros, True or False."""
    stored = config.stored(get("pathfinder", "softmax"))
    del stored["data"]["drop_below"]
    for fields, threshold in (({}, 0), ({"drop_zeros": False}, 0), ({"drop_zeros": True}, 1)):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(stored | {"data": stored["data"] | fields}))
        assert config.read(path).data.drop_below == threshold


def test_earlier_results_keep_their_digests():
    """Checks digests of runs from before all configs had mask_zeros, global_blocks and others."""
    published = get("text", "softmax")
    published.data.source = "somewhere"
    for settings, digest in (
        (get("quickstart"), "b1912710bca07c34"),
        (get("text", "bigbird,small"), "54ae8bd9bf425abc"),
        (published, "411b969001e43d04"),
    ):
        assert results.config_digest(settings) == digest
        settings.data.mask_zeros = True
        assert results.config_digest(settings) != digest


def test_a_fault_of_an_attention_is_not_blamed_on_the_config(monkeypatch):
    """A bug in an attention is raised as it is, and JAX's strict modes do not fail the check.

    An invalid option is a UserError.
    """
    settings = get("text", "skyformer")
    entry = registry.REGISTRY["skyformer"]

    def raises(query, key, value, **options):
        return jax.numpy.broadcast_to(query, (3, 5))

    def promotes(query, key, value, **options):
        return query + jax.numpy.ones(8) * options.get("gamma", 1.0)

    def use(function):
        changed = {**registry.REGISTRY, "skyformer": entry._replace(function=function)}
        monkeypatch.setattr(registry, "REGISTRY", changed)

    use(raises)
    with pytest.raises(ValueError, match="Cannot broadcast to shape") as error:
        config.check(settings, num_devices=1)
    assert not isinstance(error.value, UserError)
    use(promotes)
    with jax.numpy_rank_promotion("raise"):
        config.check(settings, num_devices=1)
    settings.attention.landmarks = "unifrom"
    use(entry.function)
    with pytest.raises(UserError, match=r"^config\.attention: .*unifrom"):
        config.check(settings, num_devices=1)


def test_fields_that_there_are_not_are_named():
    """Unknown fields are refused in unlocked configs too, which programs may build."""
    for section, message in (
        ("train", "field of config.train, 'batchsize' .did you mean 'batch_size'"),
        ("parallel", "field of config.parallel, 'batchsize'"),
    ):
        settings = get("text")
        settings[section].batchsize = 3
        with pytest.raises(UserError, match=message):
            config.check(settings, num_devices=1)


def test_values_of_another_type_are_named():
    """Wrong types are refused in configs without type safety, which programs may build."""
    for field, value, message in (
        ("model.dropout", "0.1", "must be float or int, like the default 0.1; got '0.1'"),
        ("train.batch_size", True, "must be int, like the default 32; got True"),
        ("train.statistics", 1, "must be bool, like the default False; got 1"),
    ):
        settings = ml_collections.ConfigDict(get("text").to_dict(), type_safe=False)
        settings.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match=f"^config.{field} {message}"):
            config.check(settings, num_devices=1)


def test_bad_data_fields_are_named():
    for name, field, value, message in (
        ("text", "length", 4001, "data.length must be in 1..4000"),
        ("text", "length", 0, "data.length must be in 1..4000"),
        ("image", "shrink", 0, "data.shrink must be in 1..1024"),
        ("image", "brackets", True, "unknown field of config.data, 'brackets'"),
        ("image", "buckets", (512, 256), "ascending lengths"),
        ("image", "buckets", (1024,), "ascending lengths"),
    ):
        settings = get(name)
        with settings.unlocked():
            settings.data[field] = value
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            config.check(settings, num_devices=1)
    settings = get("text", "skyformer,small")
    settings.data.length = 1000
    with pytest.raises(UserError, match=r"model\.max_length must be at least 1000"):
        config.check(settings, num_devices=1)


def test_bad_ngrams_are_named():
    settings = get("text", "skyformer,ngrams")
    for value in ((5, 3), (1,), (3, 3)):
        settings.model.ngrams = value
        with pytest.raises(
            UserError, match=r"model\.ngrams must be ascending lengths of at least 2"
        ):
            config.check(settings, num_devices=1)
    settings.model.ngrams = (3, 66)  # 512 bytes, the shortest bucket, on eight devices
    settings.parallel.data, settings.parallel.seq = 1, 8
    with pytest.raises(UserError, match=r"model\.ngrams has 66, which reaches beyond the 64"):
        config.check(settings, num_devices=8)
    settings.model.ngrams = (3, 65)
    config.check(settings, num_devices=8)


def test_tokens_and_masks_are_as_defined():
    """Bytes are shifted by one and padded with 0; only the variant "paper" masks black pixels."""
    values = np.array([[0, 255, 7, 9], [5, 0, 0, 0]], np.uint8)
    length = np.array([3, 4], np.int32)

    def read(name, argument, *arrays):
        return tokens_and_mask(run_on(get(name, argument)), *arrays, np.arange(4))

    ids, mask = read("text", "", values, length)
    np.testing.assert_array_equal(ids, [[1, 256, 8, 0], [6, 1, 1, 1]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 1, 1, 1]])
    full = np.array([4, 4], np.int32)
    ids, mask = read("image", "", values, full)
    np.testing.assert_array_equal(ids, values)
    assert mask.all()
    _, mask = read("pathfinder", "softmax,paper", values, full)
    np.testing.assert_array_equal(mask, values != 0)
    pairs = np.stack([values, values], axis=1)
    ids, mask = read("retrieval", "", pairs, np.stack([length, full], axis=1))
    assert ids.shape == mask.shape == (2, 2, 4)
    np.testing.assert_array_equal(mask[0], [[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def tiny_benchmark(tmp_path_factory):
    """Replaces the configs' tasks by tiny ones; yields their source and data directories."""
    source, data_dir = (tmp_path_factory.mktemp(name) for name in ("source", "data"))
    tiny = tiny_data.tiny_tasks()
    tiny_data.write_sources(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "num_cores", lambda: 1)
        tiny_data.load_all(tiny, source, data_dir)
        patch.setattr(tasks, "TASKS", tasks.TASKS | tiny)
        yield source, data_dir


def two_steps(name, argument, tiny_benchmark, workdir):
    """Trains a config for two steps with an evaluation and returns the result of train."""
    source, data_dir = tiny_benchmark
    settings = get(name, argument)
    settings.data.dir = str(data_dir)
    settings.data.source = "" if name == "listops" else str(source)
    settings.train.update({"num_steps": 2, "warmup_steps": 1, "batch_size": 8, "eval_every": 2})
    result = training.train(settings, workdir)
    assert np.isfinite(result["loss"])
    assert (workdir / "checkpoints" / "2").is_dir()
    return result


# The slow tests train the other tasks.
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("pathfinder", "small"),
        pytest.param("text", "small", marks=pytest.mark.slow),
        pytest.param("pathfinder", "fast", marks=pytest.mark.slow),
        pytest.param("image", "fast", marks=pytest.mark.slow),
        pytest.param("retrieval", "small", marks=pytest.mark.slow),
    ],
)
def test_each_task_trains(name, variant, tiny_benchmark, tmp_path, monkeypatch):
    """Trains with a relative source path and evaluates from another working directory."""
    source, data_dir = tiny_benchmark
    monkeypatch.chdir(source)
    tiny_benchmark = Path("."), data_dir
    result = two_steps(name, f"performer,{variant}", tiny_benchmark, tmp_path / "run")
    monkeypatch.chdir(tmp_path.parent)
    assert training.evaluate(tmp_path / "run")["loss"] == result["loss"]
    data = json.loads((tmp_path / "run" / "eval_test.json").read_text())["data"]
    assert data == result["data"]
    assert len(data["checksum"]) == 16
    entries = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (train,) = [e for e in map(json.loads, entries) if e["split"] == "train"]
    assert 0 < train["input_share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("attention_name", attention.NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_every_task_trains_with_every_attention(name, attention_name, tiny_benchmark, tmp_path):
    two_steps(name, f"{attention_name},small", tiny_benchmark, tmp_path / "run")


@pytest.mark.slow
def test_a_missing_source_can_be_added(tiny_benchmark, tmp_path):
    """The run continues in the same workdir after data.source is set, as the error suggests."""
    source, _ = tiny_benchmark
    settings = get("retrieval", "softmax,small")
    settings.model.update({"width": 16, "mlp_dim": 16})
    settings.train.update({"num_steps": 1, "warmup_steps": 0, "batch_size": 8, "eval_every": 1})
    settings.data.dir = str(tmp_path / "data")
    with pytest.raises(UserError, match="name the folder of new_aan_pairs"):
        training.train(settings, tmp_path / "run")
    settings.data.source = str(source)
    assert training.train(settings, tmp_path / "run")["examples"] == tiny_data.PAIRS["test"]
    # A run may continue if its data moved, but not if their content changed.
    settings.data.source = ""
    assert training.train(settings, tmp_path / "run")["examples"] == tiny_data.PAIRS["test"]
    shutil.copytree(source, tmp_path / "moved")
    settings.data.update({"source": str(tmp_path / "moved"), "dir": str(tmp_path / "new data")})
    assert training.train(settings, tmp_path / "run")["examples"] == tiny_data.PAIRS["test"]
    (path,) = (tmp_path / "moved").rglob("new_aan_pairs.train.tsv")
    path.write_bytes(path.read_bytes().replace(b"0.0\t", b"1.0\t", 1))
    settings.data.dir = str(tmp_path / "other data")
    with pytest.raises(UserError, match=r"was trained on other data \(checksum \w+\) than data"):
        training.train(settings, tmp_path / "run")


@pytest.mark.slow
def test_buckets_change_no_prediction_and_resume_exactly(tiny_benchmark, tmp_path):
    """A resumed run with buckets ends as an uninterrupted one; they do not change evaluation."""
    source, data_dir = tiny_benchmark
    settings = get("text", "softmax,small")
    settings.data.update({"dir": str(data_dir), "source": str(source), "length": 1000})
    settings.data.buckets = (420, 440)
    settings.model.update({"max_length": 1000, "width": 16, "mlp_dim": 16})
    settings.train.update({"num_steps": 6, "warmup_steps": 1, "batch_size": 8, "eval_every": 3})
    whole = training.train(settings, tmp_path / "whole")
    halves = tmp_path / "halves"
    halves.mkdir()
    (halves / "checkpoints").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (halves / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "3").rename(halves / "checkpoints" / "3")
    assert training.train(settings, halves)["loss"] == whole["loss"]
    edited = json.loads((halves / "config.json").read_text())
    edited["data"]["buckets"] = []
    (halves / "config.json").write_text(json.dumps(edited))
    plain = training.evaluate(halves)
    np.testing.assert_allclose(plain["loss"], whole["loss"], rtol=1e-4)


def test_the_model_of_pairs_has_their_shape():
    settings = get("retrieval", "skyformer,small")
    assert run_on(settings).token_shape == (2, 256)
    assert run_on(get("text")).token_shape == (4096,)
    assert jax.device_count() == 8
