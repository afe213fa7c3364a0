"""Makes the script of a Slurm job array that trains each cell of a grid in its own job."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def slurm_script(
    command: Sequence[str], num_cells: int, at_a_time: int | None, directory: Path, cwd: Path
) -> str:
    """Returns the text of the script.

    Args:
      command: the command of the sweep, without --cell.
      num_cells: number of jobs in the array, each with a GPU.
      at_a_time: maximum number of jobs that run at once; None leaves that to the cluster.
      directory: folder for the logs of the jobs; Slurm does not create it.
      cwd: folder in which to run the command.
    """
    limit = f"%{at_a_time}" if at_a_time else ""
    return f"""#!/bin/bash
# sbatch [--partition=NAME --time=HH:MM:SS ...] THIS_FILE; then, for the table:
# {shlex.join([*command, "--table"])}
#SBATCH --job-name=sweep
#SBATCH --array=0-{num_cells - 1}{limit}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --output="{directory.absolute()}/slurm-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

cd {shlex.quote(str(cwd))} || exit 1
# In the background, because bash runs a trap only after a foreground command has ended.
{shlex.join(command)} --cell="$SLURM_ARRAY_TASK_ID" &
sweep=$!
# USR1: the time is nearly up. TERM: preempted or cancelled. Either way the cell saves and stops.
trap 'received=USR1; kill -TERM "$sweep"' USR1
trap 'received=TERM; kill -TERM "$sweep"' TERM
while true; do  # a trap also ends wait
    wait "$sweep"
    status=$?
    kill -0 "$sweep" 2>/dev/null || break
done
if [ "$status" -ne 0 ] && [ "$received" = USR1 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
elif [ "$status" -ne 0 ] && [ "$received" = TERM ]; then
    sleep 600  # Slurm may requeue a preempted job only if it has to end it
fi
exit "$status"
"""
