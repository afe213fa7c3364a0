"""How the scripts of experiments/ write results and resume them."""

import json

import pytest

from experiments import palette, records
from skyformer_jax.attention import NAMES
from skyformer_jax.errors import UserError

HEADER = {"what": "a test", "commit": "abc", "lengths": (16, 32), "seed": 0}


def test_rows_of_the_same_settings_are_gone_on_with(tmp_path, capsys):
    path = tmp_path / "results" / "out.json"
    assert records.resume(path, HEADER) == []
    rows = [{"length": 16, "departures": {"a": [1, 2]}}]
    records.write_json(path, {**HEADER, "rows": rows, "summary": 3})
    assert records.resume(path, HEADER) == rows
    assert capsys.readouterr().err == ""

    def anew(said, **options):
        assert records.resume(path, **{"header": HEADER, **options}) == []
        assert capsys.readouterr().err == f"{path} {said}: starting over\n"

    anew("has other values of lengths, seed", header={**HEADER, "lengths": (16,), "seed": 1})
    anew("has other values of commit", header={**HEADER, "commit": "def"})
    assert records.resume(path, {**HEADER, "commit": "def"}, any_commit=True) == rows
    anew("has other values of seed", header={**HEADER, "seed": 1}, any_commit=True)
    anew("is not a result of this script", field="cells")
    for text in ("{", "[]", "3"):
        path.write_text(text)
        anew("is not a result of this script")

    dirty = {**HEADER, "commit": "abc-dirty"}
    records.write_json(path, {**dirty, "cells": rows})
    anew("is from uncommitted changes, which may have changed since", header=dirty, field="cells")
    assert records.resume(path, dirty, field="cells", any_commit=True) == rows


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "out.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), records.replacing(path) as part:
        part.write_text("{")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert records.read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(UserError, match=r"out\.json is damaged: "):
        records.read_json(path)


def test_provenance_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.provenance(1)["commit"] == "unknown"


def test_provenance_of_a_run(tmp_path):
    run, seed = tmp_path / "text-softmax", tmp_path / "text-softmax" / "seed-1"
    assert records.provenance_of_run(seed) is None
    records.write_json(run / "sweep.json", {"provenance": {"commit": "abc"}})
    assert records.provenance_of_run(run) == records.provenance_of_run(seed) == {"commit": "abc"}
    assert records.provenance_of_run(run / "another") is None


def test_provenance():
    found = records.provenance(3)
    assert set(found) == {"commit", "versions", "device", "cores"}
    assert found["device"].startswith("3 x ")
    assert found == json.loads(json.dumps(found))


def test_every_attention_has_a_colour_and_a_marker_of_its_own():
    assert set(NAMES) <= set(palette.STYLES)
    for column in zip(*palette.STYLES.values(), strict=True):
        assert len(set(column)) == len(palette.STYLES)
