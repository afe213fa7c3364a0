"""The colour and the marker of each attention, the same in all pictures."""

from typing import Any

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), black for softmax.
STYLES = {
    "softmax": ("#000000", "o"),
    "kernelized": ("#999999", "s"),
    "skyformer": ("#D55E00", "D"),
    "nystromformer": ("#0072B2", "^"),
    "linformer": ("#56B4E9", "v"),
    "informer": ("#009E73", "<"),
    "performer": ("#E69F00", ">"),
    "reformer": ("#CC79A7", "P"),
    "bigbird": ("#8B6F3E", "h"),
    # Other implementations of three of these, which experiments/benchmarks/ measures.
    "softmax-dense": ("#444444", "p"),
    "softmax-chunked": ("#777777", "d"),
    "kernelized-dense": ("#5B2A86", "*"),
    "kernelized-chunked": ("#9F86B8", "1"),
    "skyformer-chunked": ("#F0A06A", "2"),
    "flash": ("#8A9A00", "X"),
}


def line_style(name: str) -> dict[str, Any]:
    """Returns options of matplotlib's `plot` for an attention's line; Skyformer's stands out."""
    color, marker = STYLES[name]
    ours = name == "skyformer"
    return {
        "color": color,
        "marker": marker,
        "ms": 4,
        "lw": 2 if ours else 1.2,
        "zorder": 3 if ours else 2,
    }
