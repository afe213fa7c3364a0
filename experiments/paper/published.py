"""The figures printed in the paper.

Source: Chen, Zeng, Ji, Yang, "Skyformer: Remodel Self-Attention with Gaussian Kernel and Nystrom
Method", NeurIPS 2021, arXiv 2111.00035: tables 1 and 2, appendix table 1.
"""

# Columns of the tables: files in configs/.
CONFIGS = ("text", "listops", "retrieval", "pathfinder", "image")


def _table(**rows: str) -> dict[str, dict[str, float]]:
    """Returns {attention: {config: figure}}, given rows of figures in the order of CONFIGS."""
    return {
        name: dict(zip(CONFIGS, map(float, row.split()), strict=True)) for name, row in rows.items()
    }


# Test accuracy in %, mean of three seeds, 50,000 steps.
ACCURACY = _table(
    softmax="61.95 38.37 80.69 65.26 40.57",
    kernelized="60.22 38.78 81.77 70.73 41.29",
    nystromformer="64.83 38.51 80.52 69.48 41.30",
    linformer="58.93 37.45 78.19 60.93 37.96",
    informer="62.64 32.53 77.57 57.83 38.10",
    performer="64.19 38.02 80.04 66.30 41.43",
    reformer="62.93 37.68 78.99 66.49 48.87",
    bigbird="63.86 39.25 80.28 68.72 43.16",
    skyformer="64.70 38.69 82.06 70.73 40.77",
)
# Hours of 50,000 steps on a V100 of 16 GB.
HOURS = _table(
    softmax="4.30 2.24 8.33 2.57 4.22",
    kernelized="3.91 1.99 7.46 2.42 4.05",
    nystromformer="0.71 0.71 1.29 1.49 2.70",
    linformer="0.65 0.60 1.13 1.09 2.19",
    informer="1.60 1.19 2.91 2.39 3.90",
    performer="0.77 0.73 1.41 1.40 2.55",
    reformer="0.94 0.85 1.73 1.70 3.08",
    bigbird="2.00 1.88 3.81 3.39 6.53",
    skyformer="1.02 1.29 1.86 2.03 3.40",
)
# Peak memory in GB.
MEMORY = _table(
    softmax="10.37 5.37 10.77 5.74 11.47",
    kernelized="5.73 5.94 10.46 6.38 6.38",
    nystromformer="1.21 1.37 2.39 3.35 6.71",
    linformer="0.99 0.99 1.89 1.97 3.94",
    informer="5.12 4.85 5.77 4.75 9.51",
    performer="1.09 1.09 2.16 2.20 4.39",
    reformer="1.61 1.61 2.98 3.21 6.42",
    bigbird="2.83 2.71 4.97 4.97 9.95",
    skyformer="1.59 1.75 3.15 4.13 8.26",
)
# Instability score over the first 20 steps, as a ratio to softmax's.
INSTABILITY = _table(
    nystromformer="1.03 1.01 0.97 0.99 1.02",
    kernelized="0.83 0.77 0.64 0.74 0.62",
    skyformer="0.81 0.79 0.64 0.79 0.65",
)
STEPS = 50_000
SEEDS = 3
