"""Converts state dicts of the published PyTorch classifiers to variables."""

import re
import statistics
from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.attention.registry import NAMES
from skyformer_jax.errors import UserError, one_of

# One row for each variable: the name of its entry in the state dict, its path in the collections of
# variables, and the names of the entry's axes. Axes of the same name have the same size; "features"
# are the concatenated features of the heads. Entries whose path is None are not converted.
_Rows = list[tuple[str, str | None, tuple[str, ...]]]

# Entries after ".mha.attn." that only one attention has, and that identify it.
_MARKS = {
    "linformer": "E",
    "performer": "attn_fn.projection_matrix",
    "reformer": "query_key.weight",
}
# Constants that some versions of the Reformer library store in its layer.
_CONSTANTS = tuple(
    f"{what}_value_{dtype}" for what in ("self_mask", "mask") for dtype in ("float16", "float32")
)


def _linear(name: str, path: str, outputs: str, inputs: str) -> _Rows:
    return [
        (f"{name}.weight", f"params/{path}/kernel", (outputs, inputs)),
        (f"{name}.bias", f"params/{path}/bias", (outputs,)),
    ]


def _norm(name: str, path: str) -> _Rows:
    return [
        (f"{name}.weight", f"params/{path}/scale", ("width",)),
        (f"{name}.bias", f"params/{path}/bias", ("width",)),
    ]


def _attention(name: str, path: str, attention: str) -> _Rows:
    """Rows for the weights between a layer's input and the outputs of its heads."""
    rows: _Rows = [
        *_linear(f"{name}.W_q", f"{path}/query", "features", "width"),
        *_linear(f"{name}.W_k", f"{path}/key", "features", "width"),
        *_linear(f"{name}.W_v", f"{path}/value", "features", "width"),
    ]
    if attention == "linformer":  # one projection for keys and values
        of_e = ("heads", "linformer_features", "length")
        for projection in ("key_projection", "value_projection"):
            rows.append((f"{name}.attn.E", f"params/{path}/{projection}", of_e))
    if attention == "performer":
        matrix, of_matrix = f"{name}.attn.{_MARKS[attention]}", ("random_features", "head_dim")
        rows.append((matrix, f"fixed/{path}/projection", of_matrix))
    if attention == "reformer":  # has its own weights in place of W_q and W_v, without biases
        rows = [(entry, None, axes) for entry, _, axes in rows]
        for entry, projection in (("query_key", "query"), ("value", "value")):
            kernel = f"params/{path}/{projection}/kernel"
            rows.append((f"{name}.attn.{entry}.weight", kernel, ("features", "width")))
    return rows


def _layer(name: str, path: str, attention: str) -> _Rows:
    return [
        *_norm(f"{name}.norm1", f"{path}/attention_norm"),
        *_attention(f"{name}.mha", f"{path}/attention_layer", attention),
        *_linear(f"{name}.mha.ff", f"{path}/attention_layer/out", "width", "features"),
        *_norm(f"{name}.norm2", f"{path}/mlp_norm"),
        *_linear(f"{name}.mlpblock.0", f"{path}/mlp_in", "mlp_dim", "width"),
        *_linear(f"{name}.mlpblock.3", f"{path}/mlp_out", "width", "mlp_dim"),
    ]


def _rows(num_layers: int, attention: str) -> _Rows:
    words, positions = (
        f"model.embeddings.{what}_embeddings.weight" for what in ("word", "position")
    )
    rows: _Rows = [
        (words, "params/token_embedding/embedding", ("vocab", "width")),
        (positions, "params/position_embedding", ("length", "width")),
    ]
    for i in range(num_layers):
        rows += _layer(f"model.transformer_{i}", f"block_{i}", attention)
    return [
        *rows,
        *_norm("model.norm", "final_norm"),
        *_linear("seq_classifer.mlpblock.0", "head_hidden", "mlp_dim", "pooled"),  # sic
        *_linear("seq_classifer.mlpblock.2", "head_out", "classes", "mlp_dim"),
    ]


def _array(name: str, value: Any) -> np.ndarray:
    """Converts an entry to float32; raises a UserError unless all values are finite."""
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} holds {array.dtype}; expected floating-point numbers")
    with np.errstate(over="ignore"):  # overflow is reported below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are not finite in float32")
    return array


def _check_names(names: Mapping[str, Any], rows: _Rows, attention: str) -> None:
    expected = list(dict.fromkeys(name for name, _, _ in rows))
    missing = [name for name in expected if name not in names]
    unexpected = sorted(map(str, set(names).difference(expected)))
    faults = [
        f"{fault}: {', '.join(entries)}"
        for fault, entries in (("missing", missing), ("unexpected", unexpected))
        if entries
    ]
    if not faults:
        return
    if attention == "linformer" and any(name.endswith(".attn.E") for name in missing):
        faults.append("the published code does not save E where it trained on a GPU")
    what = f" with {attention}" if attention in _MARKS else ""
    raise UserError(f"not the state dict of a published classifier{what}; {'; '.join(faults)}")


def _check_shapes(arrays: Mapping[str, np.ndarray], rows: _Rows, head_dim: int) -> None:
    """Raises a UserError for the entry whose axis differs in size from most entries."""
    votes: dict[str, list[int]] = {}
    for name, _, axes in rows:
        if arrays[name].ndim == len(axes):
            for axis, size in zip(axes, arrays[name].shape, strict=True):
                votes.setdefault(axis, []).append(size)
    modes = {axis: statistics.mode(votes[axis]) for axis in votes}
    sizes: dict[str, int | str] = {**modes}
    width = modes.get("width", 0)  # 0: no entry has this axis, so the loop below raises
    if modes.get("pooled") not in (width, 4 * width):
        sizes["pooled"] = f"{width} or {4 * width}"
    features = modes.get("features", 0)
    if head_dim < 1 or features % head_dim:
        raise UserError(
            f"model.transformer_0.mha.W_q.weight has {features} rows, which head_dim={head_dim} "
            "does not divide; give the head_dim that the model was trained with"
        )
    sizes |= {"heads": features // head_dim, "head_dim": head_dim}
    for name, _, axes in rows:
        got, expected = list(arrays[name].shape), [sizes.get(axis, axis) for axis in axes]
        if got != expected:
            given = f" for head_dim={head_dim}" if {"heads", "head_dim"} & set(axes) else ""
            raise UserError(
                f"{name} has shape {got}; expected [{', '.join(map(str, expected))}]{given}"
            )


def _variable(array: np.ndarray, path: str, axes: tuple[str, ...], head_dim: int) -> np.ndarray:
    """Converts an entry to the layout of its variable.

    The last two axes of kernels and projections are swapped, so linear weights [out, in] become
    kernels [in, out]. "features" become [heads, head_dim].
    """
    if path.endswith(("/kernel", "/key_projection", "/value_projection")):
        array, axes = np.swapaxes(array, -1, -2), (*axes[:-2], axes[-1], axes[-2])
    shape: list[int] = []
    for axis, size in zip(axes, array.shape, strict=True):
        shape += [size // head_dim, head_dim] if axis == "features" else [size]
    return np.array(array.reshape(shape))  # a copy, since the caller owns the memory


def variables_from_pytorch(
    state_dict: Mapping[str, np.ndarray], *, head_dim: int = 32, attention: str | None = None
) -> dict[str, Any]:
    """Converts the state dict of a classifier that the published PyTorch code trained.

    PyTorch is needed only to read the checkpoint::

        checkpoint = torch.load(path, map_location="cpu")
        state_dict = {k: v.numpy() for k, v in checkpoint["model_state_dict"].items()}
        logits = model.apply(variables_from_pytorch(state_dict), tokens, mask)

    docs/published_weights.md lists, for each attention, the options with which the model is the
    published one, and how closely the logits agree. The published pooling is
    config.model.pooling = "padded_mean".

    Args:
      state_dict: the entries by name, each anything that np.asarray accepts. Linear weights are
        [out, in]; those of query, key and value are [heads * head_dim, width], with the rows of
        each head together. All names may begin with "module.", as nn.DataParallel writes them.
      head_dim: features of each head, which the state dict does not contain; the published models
        have 32.
      attention: the attention of the model, one of attention.NAMES. None detects Linformer,
        Performer and Reformer by entries that only they have; all others have the same entries.

    Returns:
      {"params": ...}, and for Performer also {"fixed": ...} with its random directions: nested
      dicts of float32 arrays. The parameters are those of DualClassifier if the first layer of the
      head has 4 * width inputs, and of Classifier if it has width. Kernels are [in, out]; those of
      query, key and value are [width, heads, head_dim], and that of the output
      [heads, head_dim, width]. Linformer's projections are those of sharing="none".

    Raises:
      UserError: if the attention is unknown; if an entry is missing, unexpected, misshapen, not
        floating or not finite; or if head_dim does not fit the entries. The message names the
        entry.
    """
    if attention is not None:
        one_of("attention", attention, NAMES)
    if state_dict and all(str(name).startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): state_dict[name] for name in state_dict}
    names = [str(name) for name in state_dict]
    if attention is None:
        found = [a for a in _MARKS if any(n.endswith(f".mha.attn.{_MARKS[a]}") for n in names)]
        attention = found[0] if found else "softmax"
    if attention == "reformer":
        state_dict = {
            name: value
            for name, value in state_dict.items()
            if not str(name).endswith(tuple(f".mha.attn.{constant}" for constant in _CONSTANTS))
        }
    layers = (re.match(r"model\.transformer_([0-9]+)\.", name) for name in names)
    num_layers = 1 + max((int(layer[1]) for layer in layers if layer), default=0)
    rows = _rows(num_layers, attention)
    _check_names(state_dict, rows, attention)
    arrays = {name: _array(name, state_dict[name]) for name, _, _ in rows}
    _check_shapes(arrays, rows, head_dim)
    variables = {
        path: _variable(arrays[name], path, axes, head_dim) for name, path, axes in rows if path
    }
    if attention == "reformer":
        for i in range(num_layers):
            for projection in ("query", "value"):
                path = f"params/block_{i}/attention_layer/{projection}"
                heads = variables[f"{path}/kernel"].shape[1:]
                variables[f"{path}/bias"] = np.zeros(heads, np.float32)
    return flax.traverse_util.unflatten_dict(variables, sep="/")


def from_pytorch(
    state_dict: Mapping[str, np.ndarray], *, head_dim: int = 32, attention: str | None = None
) -> dict[str, Any]:
    """Returns the "params" of variables_from_pytorch; see there for arguments and errors.

    Performer needs "fixed" as well.
    """
    variables = variables_from_pytorch(state_dict, head_dim=head_dim, attention=attention)
    return variables["params"]
