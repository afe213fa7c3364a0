"""Trains the model of a config, or continues an interrupted run: see skyformer_jax/train.py.

python train.py --config=configs/listops.py:skyformer [--config.train.batch_size=16] [--workdir=DIR]
"""

from skyformer_jax.train import command

if __name__ == "__main__":
    command()
