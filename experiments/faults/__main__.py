"""Kills, stops and starves many short runs, and checks that each still ends with the same bits.

    python -m experiments.faults
    python -m experiments.faults --faults=kill,flip --kills=20

After every fault, the next start must reach the bit-identical end of an undisturbed run, or stop
with one clear line; no finished checkpoint may be lost. The same holds if one of two processes that
share a run is killed or stopped. The same command resumes after an interruption. --dir keeps the
logs of failed trials. Full and read-only disks need the right to mount; a fault that this machine
does not allow is recorded as not tried. --small makes one trial of each fault. The exit status is 1
if any trial failed.
"""

import concurrent.futures
import json
import random
import shutil
import sys
from pathlib import Path

from absl import flags

from experiments.faults.damage import NotTriedError
from experiments.faults.runner import new_folder
from experiments.faults.trials import FAULTS, KILLS_A_TRIAL, Lab, make_lab, make_row
from experiments.records import Row, provenance, resume, write_json
from skyformer_jax import cli
from skyformer_jax.errors import one_of
from skyformer_jax.progress import say, track

_KILLS = flags.DEFINE_integer("kills", 100, "Number of SIGKILLs.", lower_bound=1)
_FAULTS = flags.DEFINE_list("faults", list(FAULTS), "Faults to try.")
_SMALL = flags.DEFINE_bool("small", False, "Make one trial of each fault.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments and positions of the faults.")
_DIR = flags.DEFINE_string("dir", "runs/faults", "Scratch folder.")
_OUT = flags.DEFINE_string("out", "results/faults.json", "JSON to write.")

_PROCESSES = 2  # training at the same time


def wanted_trials(num_processes: int) -> list[tuple[str, int]]:
    """Returns fault and index of each trial that the flags ask for, of runs of num_processes."""
    names = [name for name in _FAULTS.value if (name == "one-of-two") == (num_processes == 2)]
    numbers = {name: number for name, (_, number) in FAULTS.items()}
    numbers["kill"] = -(-_KILLS.value // KILLS_A_TRIAL)
    return [(name, i) for name in names for i in range(1 if _SMALL.value else numbers[name])]


def attempt(lab: Lab, fault: str, index: int) -> list[Row]:
    """Makes one trial and returns its rows; deletes its folder unless something was wrong."""
    folder = new_folder(lab.scratch / "trials" / f"{fault}-{index}", lab.scratch)
    rng = random.Random(f"{_SEED.value} {fault} {index}")
    try:
        rows = FAULTS[fault][0](lab, folder, rng, index)
    except NotTriedError as error:
        rows = [{**make_row("", "", f"not tried: {error}", []), "ok": None}]
    for row in rows:
        if row["ok"] is False:
            say(f"FAILED {fault}-{index} in {row['phase']}, {row['detail']}: {row['outcome']}")
    if all(row["ok"] is not False for row in rows):
        shutil.rmtree(folder, ignore_errors=True)
    named = [{"fault": fault, "trial": index, **row} for row in rows]
    # The result does not contain the path of the scratch folder.
    return json.loads(json.dumps(named).replace(str(lab.scratch), "DIR"))


def main() -> None:
    """Makes the trials that are not done yet and writes the JSON."""
    for name in _FAULTS.value:
        one_of("faults", name, FAULTS)
    scratch, out = Path(_DIR.value).absolute(), Path(_OUT.value)
    header = {
        "what": "faults in short runs, and whether these still end with the same bits",
        **provenance(1),
        "seed": _SEED.value,
    }
    rows = resume(out, header)
    done = {(row["fault"], row["trial"]) for row in rows}

    for num_processes in (1, 2):
        trials = [trial for trial in wanted_trials(num_processes) if trial not in done]
        if not trials:
            continue
        lab = make_lab(scratch, num_processes)
        pool = concurrent.futures.ThreadPoolExecutor(_PROCESSES // num_processes)
        try:
            futures = [pool.submit(attempt, lab, *trial) for trial in trials]
            completed = concurrent.futures.as_completed(futures)
            for future in track(completed, len(trials), "faults", "trials"):
                rows += future.result()
                rows.sort(key=lambda row: (list(FAULTS).index(row["fault"]), row["trial"]))
                failed = sum(row["ok"] is False for row in rows)
                write_json(out, {**header, "tried": len(rows), "failed": failed, "rows": rows})
        finally:
            pool.shutdown(cancel_futures=True)  # trials that have started are finished
    failed = sum(row["ok"] is False for row in rows)
    print(f"{failed} of {len(rows)} failed: {out}" + f", logs in {scratch}/trials" * bool(failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main)
