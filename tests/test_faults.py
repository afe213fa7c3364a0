"""The fault injection itself: its damage is real, and it detects lost or different results."""

import copy
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import import_script

from experiments.faults import damage, judge, runner, trials
from experiments.faults.judge import Seen
from experiments.faults.runner import Exit
from skyformer_jax.data.examples import Examples
from skyformer_jax.training import checkpoints
from skyformer_jax.training.state import TrainState

poisoned = import_script("faults.poisoned")

STATE = {"w": np.arange(2000.0), "b": {"c": np.ones((3, 4), np.float32)}}
TRAINING = "training skyformer on listops_small: 50,000 examples\n"
COMPILED = TRAINING + "the training step compiled in 1.0 s\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints of steps 20, 40 and 60, of which 20 is the best."""
    workdir = tmp_path_factory.mktemp("run")
    with checkpoints.open_saver(workdir / "checkpoints") as save:
        for step, validation in ((20, {"accuracy": 0.3}), (40, {"accuracy": 0.2}), (60, None)):
            save(STATE, {"step": step, "validation": validation})
    return workdir


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def newest(run):
    """Yields the newest checkpoint's folder and restores its files afterwards."""
    folder = run / "checkpoints" / "60"
    whole = contents(folder)
    yield folder
    for path, content in whole.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_look(run, newest):
    assert judge.look(run) == Seen(frozenset({20, 40, 60}), (0.3, -20), frozenset())
    assert judge.look(run, damaged=[60]).newest == 40
    assert judge.look(run / "nothing") == Seen(frozenset(), (-1.0, 0), frozenset())
    (run / "damaged" / "60-0").mkdir(parents=True)
    assert judge.look(run).aside == {"damaged/60-0"}
    (run / "damaged" / "60-0").rmdir()


@pytest.mark.parametrize("how", [damage.truncate, damage.empty])
@pytest.mark.parametrize("index", [0, 1])
def test_truncated_and_emptied(newest, how, index):
    whole = contents(newest)
    assert how(newest, random.Random(0), index)
    assert sum(map(len, contents(newest).values())) < sum(map(len, whole.values()))
    if index == 0 or how is damage.empty:
        with pytest.raises(checkpoints.DamagedCheckpointError):
            checkpoints.restore(newest.parent, 60, STATE)


def test_checkpoints_written_before_a_statistic_are_whole(tmp_path):
    """A sum that an older checkpoint lacks is restored as NaN, and nothing else is lost."""
    sums = {"loss": np.float32(2), "residual": np.ones(2, np.float32)}
    state = TrainState(
        step=np.int32(3), rng=np.ones(2, np.uint32), params=STATE, fixed={}, opt_state=(), sums=sums
    )
    folder = tmp_path / "checkpoints"
    with checkpoints.open_saver(folder) as save:
        save(state.replace(sums={"loss": sums["loss"]}), {"step": 3, "validation": None})
        save(state, {"step": 4, "validation": None})
    found, meta = checkpoints.restore(folder, 3, state)
    assert meta["step"] == 3
    assert found.sums["loss"] == 2 and np.isnan(found.sums["residual"]).all()
    np.testing.assert_array_equal(found.params["w"], STATE["w"])
    assert (checkpoints.restore(folder, 4, state)[0].sums["residual"] == 1).all()
    damage.truncate(folder / "3", random.Random(0), 0)
    with pytest.raises(checkpoints.DamagedCheckpointError):
        checkpoints.restore(folder, 3, state)


def test_flipped(newest):
    """Flips 1 to 8 bits of one file, over time of every kind of file.

    A flipped checkpoint is either refused or restores the true state.
    """
    whole, flipped, refused = contents(newest), set(), 0
    for index in range(16):
        damage.flip(newest, random.Random(index), index)
        changed = {path for path, content in contents(newest).items() if content != whole[path]}
        (path,) = changed
        pairs = zip((newest / path).read_bytes(), whole[path], strict=True)
        assert 1 <= sum((a ^ b).bit_count() for a, b in pairs) <= 8
        flipped |= {path.parent if path.parent.name == "d" else path}
        try:
            state, _ = checkpoints.restore(newest.parent, 60, STATE)
        except checkpoints.DamagedCheckpointError:
            refused += 1
        else:
            np.testing.assert_array_equal(state["w"], STATE["w"])
        (newest / path).write_bytes(whole[path])
    assert {Path("meta/metadata"), Path("state/d")} <= flipped
    assert len(flipped) > 6
    assert refused > 2


BEFORE = Seen(frozenset({20, 80, 100}), (0.3, -20), frozenset({"damaged/90-0"}))
LATER = Seen(frozenset({20, 100, 120}), (0.3, -20), BEFORE.aside)
GOES_ON = "going on from the checkpoint of step 100\n"


@pytest.mark.parametrize(
    ("after", "log", "ours", "found"),
    [
        (LATER, GOES_ON, [], []),
        (BEFORE, "", [], []),  # killed before it said anything
        (LATER._replace(best=(0.4, -120)), GOES_ON, [], []),
        (LATER, TRAINING, [], ["began anew although step 100"]),
        (LATER, GOES_ON.replace("100", "80"), [], ["from step 80 although 100"]),
        (LATER._replace(steps=frozenset({20, 80})), "", [], ["newest checkpoint, 100, is gone"]),
        (LATER._replace(best=(0.2, -100)), GOES_ON, [], ["best checkpoint, 20, is gone"]),
        (LATER._replace(best=(0.3, -40)), GOES_ON, [], ["best checkpoint, 20, is gone"]),
        (LATER._replace(aside=BEFORE.aside | {"ahead/110-0"}), GOES_ON, [], ["ahead/110-0 was"]),
        (LATER._replace(aside=BEFORE.aside | {"damaged/110-1"}), GOES_ON, [110], []),
    ],
)
def test_lost(after, log, ours, found):
    got = judge.lost(BEFORE, after, log, ours)
    assert len(got) == len(found) and all(b in a for a, b in zip(got, found, strict=True))


def test_one_bit_is_a_difference(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (20, 40):
        (tmp_path / "checkpoints" / str(step)).symlink_to(run / "checkpoints" / str(step))
    last = tmp_path / "checkpoints" / str(runner.NUM_STEPS)
    last.symlink_to(run / "checkpoints" / "60")
    entry = {"step": 20, "split": "train", "loss": 2.25, "accuracy": 0.5, "seconds": 3}
    test = {"checkpoint": 20, "accuracy": 0.25, "loss": 2.5, "confusion": [[1]], "seconds": 1.0}

    def end(entry, test):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
        (tmp_path / "eval_test.json").write_text(json.dumps(test))
        return judge.ending(tmp_path)

    expected = end(entry, test)
    assert judge.differences(expected, end({**entry, "seconds": 4}, {**test, "seconds": 2})) == []
    loss = float(np.nextafter(2.25, 3))
    assert judge.differences(expected, end({**entry, "loss": loss}, test)) == [
        "another curve at the end"
    ]
    assert judge.differences(expected, end(entry, {**test, "accuracy": 0.5})) == [
        "another test at the end"
    ]
    assert expected["digest"]
    other = {**copy.deepcopy(expected), "digest": expected["digest"][:-1] + "x"}
    assert judge.differences(expected, other) == ["another digest at the end"]


def test_phases(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    directory = run / "checkpoints"

    def phase(log):
        return runner.phase(run, data, log)

    assert phase("") == "start-up"
    (data / "listops" / "small" / "incomplete.X").mkdir(parents=True)
    assert phase("") == "start-up"  # left by an earlier kill
    assert phase("preparing listops in data\n") == "preparation"
    assert phase(TRAINING) == "compiling"
    (directory / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    assert phase(TRAINING) == "compiling"  # left by an earlier kill
    assert phase(COMPILED) == "save"
    (directory / "20.orbax-checkpoint-tmp").rename(directory / "20")
    assert phase(COMPILED + "step 30/200  loss 2.2\n") == "steps"
    assert phase(COMPILED + "step 40/200  loss 2.2\n") == "validation"
    assert phase(COMPILED + "step 40/200  validation loss 2.2\n") == "steps"
    (directory / "60").mkdir()
    assert runner.phase(run, data, COMPILED, 60) == "final evaluation"
    (directory / str(runner.NUM_STEPS)).mkdir()
    assert phase(COMPILED) == "final evaluation"
    (run / "eval_test.json").write_text("{}")
    assert phase(COMPILED) == "finished"


def test_one_clear_line():
    routine = COMPILED + "step 10/200  loss 2.2  accuracy 0.1  ETA 00:08\nstep 20/200  validation\n"
    error = "error: the disk is full\n"
    assert judge.strays(routine) == []
    assert judge.complaint(Exit(2, routine + error, "steps")) == (error.strip(), [])
    for status, log in (
        (1, routine + error),
        (0, routine),
        (2, routine),
        (2, routine + "Traceback (most recent call last):\n" + error),
        (2, routine + "OSError: no space\n"),
        (None, routine),
    ):
        assert judge.complaint(Exit(status, log, "steps"))[1]


def test_one_token_of_one_step_is_poisoned():
    examples = Examples(np.zeros(120, np.uint8), np.arange(0, 121, 3), np.zeros(40, np.int32))
    batches = poisoned.poisoned_batches(7, examples, 8, 3, seed=0, first_step=4)
    sums = [int(batch.tokens.sum()) for batch in itertools.islice(batches, 5)]
    assert sums == [0, 0, 255, 0, 0]  # steps 5 to 9


@pytest.mark.slow
def test_the_script(tmp_path):
    out = tmp_path / "faults.json"
    command = ["-m", "experiments.faults", "--small", f"--dir={tmp_path}/soak", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=runner.ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["failed"] == 0
    assert {row["fault"] for row in result["rows"]} == set(trials.FAULTS)
