"""The logs that a run writes, and how logging fails on a full disk."""

import contextlib
import struct
from types import SimpleNamespace

import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from skyformer_jax import cli
from skyformer_jax.errors import UserError, full_disk
from skyformer_jax.training import logs


def events(path):
    """The events in a TensorBoard file."""
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_events_are_there_at_once_and_later_steps_are_hidden(tmp_path):
    with contextlib.closing(logs.MetricsLog(tmp_path, 40)) as log:
        log.write(60, "train", loss=2.5, accuracy=0.25)
        (path,) = (tmp_path / "tensorboard").iterdir()
        version, restart, loss, accuracy = events(path)
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (41, SessionLog.START)
    for event, name, value in ((loss, "train/loss", 2.5), (accuracy, "train/accuracy", 0.25)):
        (scalar,) = event.summary.value
        assert (event.step, scalar.tag, scalar.simple_value) == (60, name, value)
        assert event.wall_time > 1e9


def test_a_full_disk_is_an_error_and_no_hang(tmp_path, monkeypatch):
    def open_full(path):
        return open("/dev/full", "wb")

    monkeypatch.setattr(record_writer, "open_file", open_full)
    log = logs.MetricsLog(tmp_path, 0)
    with pytest.raises(UserError, match=f"the disk of {tmp_path} is full"), full_disk(tmp_path):
        log.write(10, "train", loss=2.5)
    with pytest.raises(OSError, match="No space left"):
        log.close()


def test_other_errors_are_not_of_the_disk(tmp_path):
    with pytest.raises(KeyError), full_disk(tmp_path):
        raise KeyError("space")


def test_only_late_arrays_are_kept_quiet():
    """Hides only the errors from arrays that TensorStore delivers after Orbax gave up."""
    told = []
    hook = cli._without_late_arrays(told.append)
    for error, of, is_told in (
        (RuntimeError("Event loop is closed"), None, False),
        (RuntimeError("Event loop is closed"), print, True),
        (RuntimeError("another"), None, True),
        (ValueError("Event loop is closed"), None, True),
    ):
        told.clear()
        hook(SimpleNamespace(exc_value=error, object=of))
        assert bool(told) == is_told


def test_the_time_left_follows_the_recent_steps(monkeypatch, capsys):
    clock = 0.0
    monkeypatch.setattr(logs.time, "perf_counter", lambda: clock)
    progress = logs.StepProgress(100, 3000)  # resumed at step 100

    def steps(first, last, seconds):
        nonlocal clock
        for step in range(first + 50, last + 1, 50):
            clock += 50 * seconds
            progress.metrics(step, loss=1.0, accuracy=0.5, rate=1.0)
        return capsys.readouterr().err.splitlines()[-1]

    assert steps(100, 1100, 1.0).endswith("ETA 31:40")  # 1900 steps of a second
    assert steps(1100, 2950, 10.0).endswith("ETA 08:11")  # 50 steps of a little under 10 s
    assert steps(2950, 3000, 10.0).endswith("ETA 00:00")
