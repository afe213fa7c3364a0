"""Kills, stops and starves many short runs, and checks that each still ends with the same bits.

    python -m experiments.faults
    python -m experiments.faults --faults=kill,flip --kills=20

After every fault the next start must go on to the bit-identical end of an undisturbed run, or stop
with one clear line; no finished checkpoint may be lost. The same holds for two processes that share
a run, of which one is killed or stopped. The same command goes on where it was interrupted. --dir
keeps the logs of what failed. Full and read-only disks need the right to mount; what could not be
tried is said to be so. --small makes one trial of each fault. The exit status is 1 if any failed.
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

_KILLS = flags.DEFINE_integer("kills", 100, "Moments of SIGKILL.", lower_bound=1)
_FAULTS = flags.DEFINE_list("faults", list(FAULTS), "Which to try.")
_SMALL = flags.DEFINE_bool("small", False, "The reduced setting for a CPU or a test.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and positions.")
_DIR = flags.DEFINE_string("dir", "runs/faults", "Scratch folder.")
_OUT = flags.DEFINE_string("out", "results/faults.json", "File to write.")

_PROCESSES = 2  # that train at a time


def wanted_trials(num_processes: int) -> list[tuple[str, int]]:
    """Fault and number of each trial that the flags ask for, with so many processes a run."""
    names = [name for name in _FAULTS.value if (name == "one-of-two") == (num_processes == 2)]
    numbers = {name: number for name, (_, number) in FAULTS.items()}
    numbers["kill"] = -(-_KILLS.value // KILLS_A_TRIAL)
    return [(name, i) for name in names for i in range(1 if _SMALL.value else numbers[name])]


def attempt(lab: Lab, fault: str, index: int) -> list[Row]:
    """Makes one trial, and deletes what it leaves unless something was wrong."""
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
    # The result does not tell where the scratch folder lies.
    return json.loads(json.dumps(named).replace(str(lab.scratch), "DIR"))


def main() -> None:
    """Tries the faults that are not done yet and writes the JSON."""
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
            pool.shutdown(cancel_futures=True)  # those that have begun are finished
    failed = sum(row["ok"] is False for row in rows)
    print(f"{failed} of {len(rows)} failed: {out}" + f", logs in {scratch}/trials" * bool(failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main)
