"""Kills, stops and starves many short runs, and checks that each still ends with the same bits.

    python -m experiments.faults
    python -m experiments.faults --faults=kill,flip --kills=20

After every fault the next start must go on to the bit-identical end of an undisturbed run, or stop
with one clear line; no finished checkpoint may be lost. The same holds for two processes that share
a run, of which one is killed or stopped; they are compared with two that nothing happened to. The
JSON has commit, versions and hardware, and the same command goes on where it was interrupted.
--dir keeps the logs of what failed. Full and read-only disks need the right to mount; what
could not be tried is said to be so. --small makes one trial of each fault. The exit status is 1 if
any trial failed.
"""

import collections
import concurrent.futures
import json
import random
import shutil
import sys
from pathlib import Path

from absl import flags

from experiments.faults.damage import NotTriedError
from experiments.faults.trials import (
    FAULTS,
    KILLS_A_TRIAL,
    Lab,
    make_lab,
    make_lab_of_two,
    make_row,
)
from experiments.records import Row, provenance, resume, write_json
from skyformer_jax import cli
from skyformer_jax.errors import one_of
from skyformer_jax.progress import say, track

_KILLS = flags.DEFINE_integer("kills", 100, "Moments of SIGKILL.", lower_bound=1)
_FAULTS = flags.DEFINE_list("faults", ["all"], "Which to try.")
_SMALL = flags.DEFINE_bool("small", False, "The reduced setting for a CPU or a test.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and positions.")
_DIR = flags.DEFINE_string("dir", "runs/faults", "Scratch folder.")
_OUT = flags.DEFINE_string("out", "results/faults.json", "File to write.")

_WORKERS = 2  # processes that train at a time


def wanted_trials() -> list[tuple[str, int]]:
    """Fault and number of each trial that the flags ask for."""
    names = list(FAULTS) if _FAULTS.value == ["all"] else _FAULTS.value
    for name in names:
        one_of("faults", name, FAULTS)
    numbers = {name: number for name, (_, number) in FAULTS.items()}
    numbers["kill"] = -(-_KILLS.value // KILLS_A_TRIAL)
    return [(name, i) for name in names for i in range(1 if _SMALL.value else numbers[name])]


def attempt(lab: Lab, fault: str, index: int) -> list[Row]:
    """Makes one trial, and deletes what it leaves unless something was wrong."""
    folder = lab.scratch / "trials" / f"{fault}-{index}"
    rng = random.Random(f"{_SEED.value} {fault} {index}")
    try:
        rows = FAULTS[fault][0](lab, folder, rng, index)
    except NotTriedError as error:
        rows = [{**make_row("", "", f"not tried: {error}", []), "ok": None}]
    if all(row["ok"] is not False for row in rows):
        shutil.rmtree(folder, ignore_errors=True)
    named = [{"fault": fault, "trial": index, **row} for row in rows]
    # The result does not tell where the scratch folder lies.
    return json.loads(json.dumps(named).replace(str(lab.scratch), "DIR"))


def summary(rows: list[Row]) -> str:
    """The outcomes, counted by fault and phase."""
    counts = collections.Counter(
        (row["fault"], row["phase"] or "-", row["ok"], row["outcome"]) for row in rows
    )
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"{'fault':11}{'phase':18}{'trials':>6}  outcome"]
    for (fault, phase, ok, outcome), count in sorted(counts.items(), key=str):
        lines.append(f"{fault:11}{phase:18}{count:6}  {words[ok]}: {outcome[:100]}")
    return "\n".join(lines)


def main() -> None:
    """Tries the faults that are not done yet, prints the summary and writes the JSON."""
    wanted = wanted_trials()
    scratch, out = Path(_DIR.value).absolute(), Path(_OUT.value)
    header = {
        "what": "faults in short runs, and whether these still end with the same bits",
        **provenance(1),
        "seed": _SEED.value,
    }
    rows = resume(out, header)
    done = {(row["fault"], row["trial"]) for row in rows}
    missing = [trial for trial in wanted if trial not in done]
    random.Random(_SEED.value).shuffle(missing)  # long and short mixed, for the time left
    order = list(FAULTS)

    def write() -> int:
        rows.sort(key=lambda row: (order.index(row["fault"]), row["trial"]))
        failed = sum(row["ok"] is False for row in rows)
        write_json(out, {**header, "tried": len(rows), "failed": failed, "rows": rows})
        return failed

    for make, workers in ((make_lab, _WORKERS), (make_lab_of_two, _WORKERS // 2)):
        of_two = make is make_lab_of_two
        trials = [trial for trial in missing if (trial[0] == "one-of-two") == of_two]
        if not trials:
            continue
        lab = make(scratch)
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(attempt, lab, *trial) for trial in trials]
            completed = concurrent.futures.as_completed(futures)
            for future in track(completed, len(trials), "faults", "trials"):
                rows += future.result()
                for row in future.result():
                    if row["ok"] is False:
                        say("FAILED {fault}-{trial} in {phase}, {detail}: {outcome}".format(**row))
                write()
        finally:
            pool.shutdown(cancel_futures=True)  # those that have begun are finished
    failed = write()
    print(summary(rows))
    if failed:
        print(f"{failed} of {len(rows)} failed; their logs are in {scratch}/trials")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
