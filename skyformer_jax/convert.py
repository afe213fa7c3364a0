"""Parameters from the classifiers of the published PyTorch code."""

import re
import statistics
from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np

from skyformer_jax.errors import UserError

# One row for each entry of the state dict: its name, the path of the parameter, and the names of
# its axes. Axes of one name have one size; "features" are the heads' features side by side.
_Rows = list[tuple[str, str, tuple[str, ...]]]


def _linear(name: str, path: str, outputs: str, inputs: str) -> _Rows:
    return [
        (f"{name}.weight", f"{path}/kernel", (outputs, inputs)),
        (f"{name}.bias", f"{path}/bias", (outputs,)),
    ]


def _norm(name: str, path: str) -> _Rows:
    return [
        (f"{name}.weight", f"{path}/scale", ("width",)),
        (f"{name}.bias", f"{path}/bias", ("width",)),
    ]


def _layer(name: str, path: str) -> _Rows:
    return [
        *_norm(f"{name}.norm1", f"{path}/attention_norm"),
        *_linear(f"{name}.mha.W_q", f"{path}/attention_layer/query", "features", "width"),
        *_linear(f"{name}.mha.W_k", f"{path}/attention_layer/key", "features", "width"),
        *_linear(f"{name}.mha.W_v", f"{path}/attention_layer/value", "features", "width"),
        *_linear(f"{name}.mha.ff", f"{path}/attention_layer/out", "width", "features"),
        *_norm(f"{name}.norm2", f"{path}/mlp_norm"),
        *_linear(f"{name}.mlpblock.0", f"{path}/mlp_in", "mlp_dim", "width"),
        *_linear(f"{name}.mlpblock.3", f"{path}/mlp_out", "width", "mlp_dim"),
    ]


def _rows(num_layers: int) -> _Rows:
    embeddings = "model.embeddings"
    rows: _Rows = [
        (f"{embeddings}.word_embeddings.weight", "token_embedding/embedding", ("vocab", "width")),
        (f"{embeddings}.position_embeddings.weight", "position_embedding", ("length", "width")),
    ]
    for i in range(num_layers):
        rows += _layer(f"model.transformer_{i}", f"block_{i}")
    return [
        *rows,
        *_norm("model.norm", "final_norm"),
        *_linear("seq_classifer.mlpblock.0", "head_hidden", "mlp_dim", "pooled"),  # their spelling
        *_linear("seq_classifer.mlpblock.2", "head_out", "classes", "mlp_dim"),
    ]


def _array(name: str, value: Any) -> np.ndarray:
    """The entry as finite float32."""
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} holds {array.dtype}; expected floating-point numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused here
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are not finite in float32")
    return array


def _check_names(names: Mapping[str, Any], rows: _Rows) -> None:
    expected = [name for name, _, _ in rows]
    missing = [name for name in expected if name not in names]
    unexpected = sorted(map(str, set(names).difference(expected)))
    faults = [
        f"{fault}: {', '.join(entries)}"
        for fault, entries in (("missing", missing), ("unexpected", unexpected))
        if entries
    ]
    if faults:
        raise UserError(f"not the state dict of a published classifier; {'; '.join(faults)}")


def _check_shapes(arrays: Mapping[str, np.ndarray], rows: _Rows) -> None:
    """Each axis must have the size that most entries give it, so that the odd one out is named."""
    votes: dict[str, list[int]] = {}
    for name, _, axes in rows:
        if arrays[name].ndim == len(axes):
            for axis, size in zip(axes, arrays[name].shape, strict=True):
                votes.setdefault(axis, []).append(size)
    modes = {axis: statistics.mode(votes[axis]) for axis in votes}
    sizes: dict[str, int | str] = {**modes}
    width = modes.get("width", 0)  # 0: no entry has it, so the loop below refuses
    if modes.get("pooled") not in (width, 4 * width):
        sizes["pooled"] = f"{width} or {4 * width}"
    for name, _, axes in rows:
        got, expected = list(arrays[name].shape), [sizes.get(axis, axis) for axis in axes]
        if got != expected:
            raise UserError(f"{name} has shape {got}; expected [{', '.join(map(str, expected))}]")


def _parameter(array: np.ndarray, path: str, axes: tuple[str, ...], head_dim: int) -> np.ndarray:
    """Linear weights [out, in] become kernels [in, out], and "features" [heads, head_dim]."""
    if path.endswith("/kernel"):
        array, axes = array.T, axes[::-1]
    shape: list[int] = []
    for axis, size in zip(axes, array.shape, strict=True):
        shape += [size // head_dim, head_dim] if axis == "features" else [size]
    return np.array(array.reshape(shape))  # a copy: the caller's memory is not shared


def from_pytorch(state_dict: Mapping[str, np.ndarray], *, head_dim: int = 32) -> dict[str, Any]:
    """The parameters of a classifier that the published PyTorch code trained.

    PyTorch is needed only where the checkpoint is read::

        checkpoint = torch.load(path, map_location="cpu")
        state_dict = {k: v.numpy() for k, v in checkpoint["model_state_dict"].items()}
        params = from_pytorch(state_dict)
        logits = model.apply({"params": params}, tokens, mask)

    The published code's pooling is config.model.pooling = "padded_mean".

    Args:
      state_dict: the entries by name, each anything that np.asarray takes. Linear weights are
        [out, in], the query's, key's and value's [heads * head_dim, width] with each head's rows
        together. All names may begin with "module.", as nn.DataParallel has it.
      head_dim: features of each head, which the state dict does not tell; 32 is published.

    Returns:
      Nested dict of float32 arrays: of DualClassifier where the head's first layer reads
      4 * width features, of Classifier where it reads width. The kernels are [in, out], the
      query's, key's and value's [width, heads, head_dim], the output's [heads, head_dim, width].

    Raises:
      UserError: if an entry is missing, unexpected, misshapen, not floating or not finite, or if
        head_dim does not divide the features of the heads. The message names the entry.
    """
    if state_dict and all(str(name).startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): state_dict[name] for name in state_dict}
    layers = (re.match(r"model\.transformer_([0-9]+)\.", str(name)) for name in state_dict)
    rows = _rows(1 + max((int(layer[1]) for layer in layers if layer), default=0))
    _check_names(state_dict, rows)
    arrays = {name: _array(name, state_dict[name]) for name, _, _ in rows}
    _check_shapes(arrays, rows)
    query = "model.transformer_0.mha.W_q.weight"
    features = len(arrays[query])
    if head_dim < 1 or features % head_dim:
        raise UserError(
            f"{query} has {features} rows, which head_dim={head_dim} does not divide; "
            "give the head_dim that the model was trained with"
        )
    params = {path: _parameter(arrays[name], path, axes, head_dim) for name, path, axes in rows}
    return flax.traverse_util.unflatten_dict(params, sep="/")
