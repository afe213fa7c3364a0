"""Evaluates a run or a released checkpoint: see skyformer_jax/eval.py.

python eval.py --workdir=runs/quickstart-skyformer [--split=test] [--checkpoint=best|latest|STEP]
python eval.py --checkpoint_dir=checkpoints/text-skyformer [--source=DIR] [--out=FILE.json]
"""

from skyformer_jax.eval import command

if __name__ == "__main__":
    command()
