"""Real runs in separate processes: killed, stopped, damaged, refused and evaluated."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from run_on import run_on

import skyformer_jax
from skyformer_jax import cli, training
from skyformer_jax.errors import UserError
from skyformer_jax.training import checkpoints, results
from skyformer_jax.training.config import read
from skyformer_jax.training.state import state_spec

ROOT = Path(__file__).parent.parent
NUM_STEPS, EVAL_EVERY = 120, 20
TINY = {
    "model.width": 16,
    "model.num_layers": 1,
    "model.mlp_dim": 16,
    "attention.num_landmarks": 8,
    "train.num_steps": NUM_STEPS,
    "train.eval_every": EVAL_EVERY,
    "train.warmup_steps": 5,
    "train.log_every": 8,
    "train.batch_size": 16,
    "train.sample_length": 24,
    "train.sample_steps": NUM_STEPS,
    "train.curriculum": ("listops_small",),
    "train.curriculum_steps": (50,),
}
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}


def train_command(workdir, data_dir, **overrides):
    fields = {**TINY, "data.dir": data_dir, **overrides}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT}/configs/quickstart.py",
        f"--workdir={workdir}",
        *flags,
    ]


def run(command, **options):
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options
    )


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def start_and_signal(command, number, when):
    """Starts a run and sends the signal as soon as when() is true; returns (status, stderr)."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while process.poll() is None and not when() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """The workdir and the completed process of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(train_command(workdir, data_dir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def final_state(workdir):
    spec = state_spec(run_on(read(workdir / "config.json")))
    return checkpoints.restore(workdir / "checkpoints", NUM_STEPS, spec)


def test_killed_and_stopped_runs_end_with_the_same_bits(undisturbed, tmp_path, data_dir):
    workdir = tmp_path / "disturbed"
    command = train_command(workdir, data_dir)
    folder = workdir / "checkpoints"

    # SIGKILL once during a save and once between saves.
    status, _ = start_and_signal(
        command, signal.SIGKILL, lambda: any(folder.glob("*checkpoint-tmp*"))
    )
    assert status == -signal.SIGKILL
    reached = max(checkpoints.steps(folder), default=0)
    status, stderr = start_and_signal(
        command,
        signal.SIGKILL,
        lambda: max(checkpoints.steps(folder), default=0) > reached,
    )
    assert status == -signal.SIGKILL
    assert not reached or f"checkpoint of step {reached}" in stderr
    assert reached < max(checkpoints.steps(folder)) < NUM_STEPS

    # SIGTERM between validations: the run saves, says so and exits cleanly.
    before = last_step(workdir)
    status, stderr = start_and_signal(
        command, signal.SIGTERM, lambda: last_step(workdir) != before and folder.exists()
    )
    assert status == 0, stderr
    assert "saved. Start the same command to go on" in stderr

    done = run(command)
    assert done.returncode == 0, done.stderr
    state, meta = final_state(workdir)
    expected, expected_meta = final_state(undisturbed[0])
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert meta["validation"] == expected_meta["validation"]
    assert meta["examples_read"] == NUM_STEPS * TINY["train.batch_size"]

    def curve(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [(e["step"], e["split"], e["loss"], e["accuracy"]) for e in entries]

    assert curve(workdir) == curve(undisturbed[0])


@pytest.mark.slow
def test_seeds_at_once_are_runs_of_their_own(undisturbed, tmp_path, data_dir):
    """Two seeds in one program are killed between their saves; the first equals the run alone."""
    workdir = tmp_path / "seeds"
    seeds = {"num_seeds": 2}
    command = train_command(workdir, data_dir, **seeds)
    first, second = (workdir / f"seed-{i}" / "checkpoints" for i in (0, 1))
    status, _ = start_and_signal(
        command,
        signal.SIGKILL,
        lambda: len(checkpoints.steps(first)) > 1 and any(second.glob("*checkpoint-tmp*")),
    )
    assert status == -signal.SIGKILL
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step" in done.stderr
    assert "2 seeds" in done.stdout and "standard deviation" in done.stdout

    state, _ = final_state(workdir / "seed-0")
    expected, _ = final_state(undisturbed[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state, expected
    )
    summary = json.loads((workdir / "eval_test.json").read_text())
    alone = json.loads((undisturbed[0] / "eval_test.json").read_text())
    each = summary["seeds"]
    assert abs(each["0"]["accuracy"] - alone["accuracy"]) < 0.005
    assert each["0"]["accuracy"] != each["1"]["accuracy"]
    np.testing.assert_allclose(
        summary["accuracy"], (each["0"]["accuracy"] + each["1"]["accuracy"]) / 2
    )
    one = training.evaluate(workdir / "seed-1")
    assert one["accuracy"] == each["1"]["accuracy"]

    # A seed's folder is the workdir of a single run, which is already finished here.
    status = run(train_command(workdir / "seed-1", data_dir, seed=1))
    assert status.returncode == 0, status.stderr
    refused = run(train_command(workdir, data_dir))
    assert refused.returncode == 2 and "num_seeds (saved: 2, asked for: 1)" in refused.stderr


def test_the_newest_checkpoint_of_all(tmp_path):
    """Moves aside checkpoints that some seeds lack or have damaged, and newer ones with them."""
    state = {"w": np.arange(5.0)}
    directories = [tmp_path / name / "checkpoints" for name in "ab"]

    def save(i, step):
        with checkpoints.open_saver(directories[i]) as save_one:
            tree = {"w": state["w"] + 10 * i + step}
            save_one(tree, {"step": step, "validation": None})

    assert checkpoints.restore_latest(directories, state) is None
    save(0, 1)
    assert checkpoints.restore_latest(directories, state) is None  # killed before seed b saved
    for step in (1, 2, 3):
        save(0, step)
    for step in (1, 2):
        save(1, step)
    states, step = checkpoints.restore_latest(directories, state)
    assert step == 2
    np.testing.assert_array_equal(states[1]["w"], state["w"] + 12)
    assert checkpoints.steps(directories[0]) == [2]
    save(0, 3)  # the step can be saved again
    save(1, 3)
    flip_bytes(directories[1] / "3")
    assert checkpoints.restore_latest(directories, state)[1] == 2
    assert [checkpoints.steps(d) for d in directories] == [[2], [2]]
    assert {p.name for p in (tmp_path / "a" / "ahead").iterdir()} == {"1-0", "3-1", "3-2"}


def test_a_run_leaves_what_it_says(undisturbed):
    workdir, done = undisturbed
    assert "floor: root operator" in done.stdout
    assert f"python eval.py --workdir={workdir}" in done.stdout
    assert "curriculum: listops_small to step 50, then listops_small, which" in done.stderr
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in done.stderr  # plain lines: not a terminal
    assert "examples/s" in done.stderr and "ETA" in done.stderr
    for name in ("config.json", "metrics.jsonl", "learning_curve.png", "eval_test.json"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").iterdir())
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    validations = {e["step"]: e["accuracy"] for e in entries if e["split"] == "validation"}
    assert sorted(validations) == list(range(EVAL_EVERY, NUM_STEPS + 1, EVAL_EVERY))
    best = json.loads((workdir / "eval_test.json").read_text())["checkpoint"]
    assert validations[best] == max(validations.values())
    kept = checkpoints.steps(workdir / "checkpoints")
    assert set(kept) == {best, NUM_STEPS - EVAL_EVERY, NUM_STEPS}


@pytest.mark.slow
def test_eval_by_itself(undisturbed, tmp_path):
    """A moved workdir, with its name shortened, gives the same result on other devices."""
    workdir, _ = undisturbed
    moved = tmp_path / "undisturbed-skyformer"
    shutil.copytree(workdir, moved)
    (moved / "eval_test.json").unlink()
    done = run(
        [sys.executable, str(ROOT / "eval.py"), "--workdir=undisturbed", "--batch_size=7"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first = json.loads((workdir / "eval_test.json").read_text())
    again = json.loads((moved / "eval_test.json").read_text())
    assert first.pop("seconds") and again.pop("seconds")
    np.testing.assert_allclose(again.pop("loss"), first.pop("loss"), atol=2e-6)
    assert again == first
    assert np.sum(again["confusion"]) == again["examples"] == 5000
    np.testing.assert_allclose(again["accuracy"], np.trace(again["confusion"]) / 5000)

    eight = training.evaluate(moved, landmark_draws=2)  # on this process's eight devices
    assert eight["accuracy"] == first["accuracy"]
    assert len(eight["landmark_draws"]["accuracies"]) == 2
    latest = training.evaluate(moved, split="validation", checkpoint="latest")
    assert (latest["checkpoint"], latest["examples"]) == (NUM_STEPS, 2000)
    assert latest["accuracy"] == latest["validation"]["accuracy"]
    with pytest.raises(UserError, match=f"{NUM_STEPS}"):
        training.evaluate(moved, checkpoint="12345")
    with pytest.raises(UserError, match="validation"):
        training.evaluate(moved, split="valid")


def flip_bytes(step_folder):
    """Inverts four bytes in the middle of the largest file of the state."""
    largest = max(
        (p for p in (step_folder / "state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    for i in range(middle, middle + 4):
        content[i] ^= 0xFF
    largest.write_bytes(content)


def truncate(step_folder):
    for path in (step_folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def test_the_best_and_the_two_latest_are_kept(tmp_path):
    """Holds within a run and across restarts; an unvalidated checkpoint is never the best."""
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: 0.2, 7: 0.3}

    def save(*some):
        with checkpoints.open_saver(tmp_path) as save_one:
            for step in some:
                accuracy = accuracies[step]
                validation = None if accuracy is None else {"accuracy": accuracy}
                save_one({"w": np.ones(3)}, {"step": step, "validation": validation})
        assert not list((tmp_path / "deleted").glob("*"))
        return checkpoints.steps(tmp_path)

    assert save(1, 2, 3, 4) == [2, 3, 4]
    (tmp_path / "deleted" / "4" / "state").mkdir(parents=True)  # as a kill leaves it
    assert save(5, 6) == [2, 5, 6]
    assert checkpoints.find(tmp_path, "best") == 2
    for path in (tmp_path / "2").rglob("*"):  # damage the best one's meta
        if path.is_file() and path.parent.name == "meta":
            path.write_text("{")
    assert save(7) == [6, 7]
    assert checkpoints.find(tmp_path, "best") == 7


@pytest.mark.parametrize(
    "damage", [flip_bytes, *(pytest.param(x, marks=pytest.mark.slow) for x in (truncate, empty))]
)
def test_a_damaged_newest_checkpoint_is_put_aside(undisturbed, tmp_path, damage, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    directory = workdir / "checkpoints"
    damage(directory / str(NUM_STEPS))
    config = read(workdir / "config.json")
    spec = state_spec(run_on(config))
    with pytest.raises(checkpoints.DamagedCheckpointError, match="damaged"):
        checkpoints.restore(directory, NUM_STEPS, spec)
    result = training.train(config, workdir)  # resumes from the one before and finishes
    assert "is damaged" in capsys.readouterr().err
    assert result["examples"] == 5000
    assert NUM_STEPS in checkpoints.steps(directory)
    assert list((workdir / "damaged").iterdir())


@pytest.mark.slow
def test_all_checkpoints_damaged_is_said(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    for step in checkpoints.steps(workdir / "checkpoints"):
        truncate(workdir / "checkpoints" / str(step))
    with pytest.raises(UserError, match="all checkpoints"):
        training.train(read(workdir / "config.json"), workdir)


def rewrite_config(workdir, change):
    """Changes the content of config.json by a function."""
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_runs_of_earlier_versions_are_read(undisturbed, tmp_path):
    """config.json of 0.1.0 has neither a version nor the fields of later versions."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    config = read(workdir / "config.json")

    def as_of_old(content):
        assert content.pop("version") == skyformer_jax.__version__
        content["train"]["steps_per_call"] = 1
        del content["num_seeds"], content["model"]["remat"], content["parallel"]
        del content["data"]["mask_zeros"], content["attention"]["num_iterations"]

    rewrite_config(workdir, as_of_old)
    assert read(workdir / "config.json") == config
    result = training.evaluate(workdir)
    before = json.loads((undisturbed[0] / "eval_test.json").read_text())
    assert result["config_digest"] == before["config_digest"]
    assert result["confusion"] == before["confusion"]
    # A config without these fields, such as a user's, means the same, and the run is finished.
    del config.model["remat"], config.data["mask_zeros"]
    assert training.train(config, workdir)["confusion"] == before["confusion"]
    assert json.loads((workdir / "config.json").read_text())["model"]["remat"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"nesterov": True}}, "unknown field of config.train, 'nesterov'"),
        ({"attention": {"name": "skyformer", "power": 2}}, "has no option 'power'"),
        ({"attention": {"name": "hyena"}}, "unknown attention 'hyena'"),
        ({"task": "chess"}, "unknown task 'chess'"),
        (
            {"train": {"batch_size": 16.0}},
            "config.train.batch_size must be int, like the default 32; got 16.0",
        ),
        ({"data": {"dir": None}}, "config.data.dir must be str, like the default 'data'; got None"),
    ],
)
def test_what_a_later_version_wrote_is_read_or_refused_by_name(
    undisturbed, tmp_path, change, message
):
    shutil.copy(undisturbed[0] / "config.json", tmp_path)
    rewrite_config(tmp_path, lambda content: content.update(version="9.9.0"))
    assert read(tmp_path / "config.json") == read(undisturbed[0] / "config.json")
    rewrite_config(tmp_path, lambda content: content.update(change))
    with pytest.raises(UserError, match=rf"skyformer_jax 9\.9\.0, and .* not read it: .*{message}"):
        read(tmp_path / "config.json")


def test_a_config_that_is_not_that_of_the_checkpoints_is_refused(undisturbed, tmp_path):
    """With another number of heads all shapes stay the same, and only the results would differ."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    rewrite_config(workdir, lambda content: content["model"].update(num_heads=1, head_dim=64))
    message = (
        r"step \d+ in .*checkpoints was trained with another config than .*config\.json says; "
        r"restore there: model\.head_dim \(saved: 32, .* model\.num_heads \(saved: 2, "
    )
    with pytest.raises(UserError, match=message):
        training.evaluate(workdir)
    config = read(workdir / "config.json")
    config.train.num_steps += EVAL_EVERY
    with pytest.raises(UserError, match=message):
        training.train(config, workdir)
    assert checkpoints.steps(workdir / "checkpoints") == checkpoints.steps(
        undisturbed[0] / "checkpoints"
    )


@pytest.mark.slow
def test_more_steps_go_on_by_the_longer_schedule(undisturbed, tmp_path, capsys):
    """log_every, non_finite and remat may change too; fewer steps than already done are refused."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    config = read(workdir / "config.json")
    config.train.update({"num_steps": NUM_STEPS + 20, "log_every": 10, "non_finite": "skip"})
    config.model.remat = True
    assert training.train(config, workdir)["examples"] == 5000
    said = capsys.readouterr().err
    # The rate falls linearly from 2e-3 at step 5 to nearly 0 at the end.
    rate = 2e-3 * 20 / (NUM_STEPS + 20 - 5)
    assert f"train.num_steps was {NUM_STEPS} and is {NUM_STEPS + 20}" in said
    assert f"{rate:.2e} at this step, not 8.00e-09, and 8.00e-09 at the end" in said
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    after = [e for e in entries if e["step"] > NUM_STEPS and e["split"] == "train"]
    assert [e["step"] for e in after] == [NUM_STEPS + 10, NUM_STEPS + 20]
    np.testing.assert_allclose(after[0]["learning_rate"], 2e-3 * 11 / 215, rtol=1e-2)
    assert max(checkpoints.steps(workdir / "checkpoints")) == NUM_STEPS + 20

    config.train.num_steps = NUM_STEPS
    fewer = f"num_steps={NUM_STEPS} is less than the {NUM_STEPS + 20} steps"
    with pytest.raises(UserError, match=fewer):
        training.train(config, workdir)
    config.train.update({"num_steps": NUM_STEPS + 20, "eval_every": 5})
    with pytest.raises(UserError, match=r"another config.*eval_every \(saved: 20, asked for: 5\)"):
        training.train(config, workdir)


# Starts a program for which file permissions hold even as root (PR_CAPBSET_DROP).
BOUND = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_evaluated(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    (workdir / "eval_test.json").unlink()
    workdir.chmod(0o555)

    def evaluate(*flags):
        command = [sys.executable, str(ROOT / "eval.py"), f"--workdir={workdir}", *flags]
        done = run([sys.executable, "-c", BOUND, *command])
        assert f"checkpoint of step {before['checkpoint']}" in done.stdout
        return done.returncode, done.stderr

    before = json.loads((undisturbed[0] / "eval_test.json").read_text())
    status, said = evaluate()
    assert status == 0
    (line,) = said.splitlines()
    assert line.startswith(f"eval_test.json is not written into {workdir} (Permission denied)")
    out = tmp_path / "elsewhere" / "result.json"
    assert evaluate(f"--out={out}") == (0, "")
    assert json.loads(out.read_text())["confusion"] == before["confusion"]
    assert not list(workdir.glob("*.tmp"))
    workdir.chmod(0o755)
    with pytest.raises(UserError, match=r"^--out=.* cannot be written: File exists; name"):
        training.evaluate(workdir, out=out / "result.json")
    training.evaluate(workdir, out=f"{tmp_path}/new/")
    assert (tmp_path / "new" / "eval_test.json").is_file()
    training.evaluate(workdir, out=out.parent)
    assert (
        json.loads((out.parent / "eval_test.json").read_text())["confusion"] == before["confusion"]
    )


def test_printed_commands_can_be_pasted(undisturbed, capsys):
    result = json.loads((undisturbed[0] / "eval_test.json").read_text())
    workdir = Path("my runs") / "it's $HOME; #1"
    results.print_summary(workdir, result)
    board, evaluate = capsys.readouterr().out.splitlines()[-2:]
    assert shlex.split(board)[1:] == ["tensorboard", "--logdir", str(workdir)]
    assert shlex.split(evaluate)[2:] == ["python", "eval.py", f"--workdir={workdir}"]


def test_paths_of_flags_begin_at_home(tmp_path, monkeypatch):
    """Flags expand ~ themselves, because shells leave --flag=~/path as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my configs.py").write_text((ROOT / "configs/quickstart.py").read_text())
    argv = ["train.py", "--config=~/my configs.py:softmax", "--config.data.dir=~/the data"]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    cli.parse(values, [*argv, "--workdir", "~/runs"])
    assert config.value.attention.name == "softmax"
    assert config.value.data.dir == f"{tmp_path}/the data"
    assert workdir.value == f"{tmp_path}/runs"
    with pytest.raises(UserError, match="~nobody-of-that-name/x begins with a home folder that"):
        cli.parse(values, [*argv, "--workdir=~nobody-of-that-name/x"])


def test_what_a_config_imports_is_named_where_it_lacks(tmp_path):
    for name, message in (
        ("configs.nothing", "configs.nothing, which is none of the package's configs"),
        ("experiments.no", "experiments.no, which lies in the clone: put that into PYTHONPATH"),
        ("no_such_module", "no_such_module, which is not installed"),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(f"import {name}")
        argv = ["train.py", f"--config={path}"]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        with pytest.raises(UserError, match=f"^the config file imports {message}$"):
            cli.parse(values, argv)


def test_another_config_is_refused_with_the_fields(undisturbed, data_dir):
    done = run(train_command(undisturbed[0], data_dir, seed=3, **{"train.learning_rate": 0.5}))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "seed (saved: 0, asked for: 3)" in line
    assert "train.learning_rate" in line and "train.batch_size" not in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batchsize": 3}, "field: 'batchsize' Did you mean \"batch_size\" instead"),
        ({"attention.name": "skyfomer"}, "did you mean 'skyformer'"),
        ({"attention.name": "softmax"}, "--config=FILE:softmax"),
        ({"train.warmup_steps": NUM_STEPS}, "train.num_steps - 1"),
        ({"model.width": "wide"}, "wide"),
        ({"data.source": "/nowhere"}, "takes no data.source"),
        *[
            pytest.param(*setting, marks=pytest.mark.slow)
            for setting in (
                ({"model.pooling": "max"}, "mean, cls, padded_mean"),
                ({"model.positions": "sinusoidal", "model.width": 15}, "must be divisible by 2"),
                ({"train.num_steps": 0}, "at least 1"),
                ({"model.max_length": 20}, "at least 48"),
                ({"task": "listop"}, "did you mean 'listops'"),
                ({"data.buckets": "(32,16)"}, "ascending lengths below model.max_length=48"),
                ({"model.num_documents": 2}, "must be 1 for task listops_small"),
            )
        ],
    ],
)
def test_bad_settings_get_one_line(tmp_path, data_dir, overrides, message):
    done = run(train_command(tmp_path / "run", data_dir, **overrides))
    assert done.returncode not in (0, -signal.SIGABRT)
    (line,) = [text for text in done.stderr.strip().splitlines() if not text.startswith("Fatal")]
    assert message in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_bad_files_get_one_line(tmp_path, data_dir):
    (tmp_path / "file").write_text("")

    def fails(*arguments, message, devices=1):
        environment = {
            **ENVIRONMENT,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert message in line, line
        assert "Traceback" not in line

    train, evaluate, quickstart = (
        ROOT / "train.py",
        ROOT / "eval.py",
        ROOT / "configs/quickstart.py",
    )
    fails(*train_command(tmp_path / "file", data_dir)[1:], message="is a file")
    fails(train, f"--config={quickstart}:skyformr", message="did you mean 'skyformer'")
    fails(train, f"--config={quickstart}:softmax,papr", message="variant")
    fails(train, f"--config={tmp_path}/none.py", message="none.py")
    command = train_command(tmp_path / "run", data_dir, **{"train.batch_size": 18})[1:]
    fails(*command, message="not divisible by the 4 devices", devices=4)
    fails(
        train,
        f"--config={ROOT}/configs/listops.py",
        f"--workdir={tmp_path}/official",
        f"--config.data.source={tmp_path}",
        f"--config.data.dir={tmp_path}/data",
        message="basic_train.tsv",
    )
    fails(evaluate, f"--workdir={tmp_path}/none", message="does not exist")
    fails(evaluate, f"--workdir={tmp_path}", message="not a workdir")


@pytest.mark.slow
def test_a_full_disk_is_said_before_training(monkeypatch, tmp_path, undisturbed):
    config = read(undisturbed[0] / "config.json")
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    with pytest.raises(UserError, match="free some space"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_two_processes_in_one_workdir_and_a_link_to_nothing_are_refused(undisturbed, tmp_path):
    config = read(undisturbed[0] / "config.json")
    (tmp_path / "link").symlink_to(tmp_path / "purged")
    with pytest.raises(UserError, match=r"link is a link to .*purged, which does not exist; make"):
        training.train(config, tmp_path / "link" / "run")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            training.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(undisturbed, tmp_path):
    config = read(undisturbed[0] / "config.json")
    config.train.update({"learning_rate": 1e30, "num_steps": 30})
    with pytest.raises(UserError, match=r"not finite at step \d+, seed 0; the last good"):
        training.train(config, tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") in ([], [20])
