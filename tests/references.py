"""The attentions again, in plain float64 NumPy: the independent references of the tests."""

import numpy as np


def gaussian_kernel(x, y, scale):
    """[a, p], [b, p] -> [a, b], by the differences themselves."""
    return np.exp(-scale / 2 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1))


def per_head(function, query, key, value, mask=None):
    """Applies function(q, k, v) -> out, one example and one head at a time, real keys only."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, q_length, heads, head_dim = query.shape
    out = np.zeros((batch, q_length, heads, head_dim))
    for b in range(batch):
        real = slice(None) if mask is None else np.asarray(mask[b])
        for h in range(heads):
            k, v = key[b, real, h], value[b, real, h]
            if len(k):
                out[b, :, h] = function(query[b, :, h], k, v)
    return out


def softmax(query, key, value, mask=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def one(q, k, v):
        scores = scale * q @ k.T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True) @ v

    return per_head(one, query, key, value, mask)


def kernelized(query, key, value, mask=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return per_head(lambda q, k, v: gaussian_kernel(q, k, scale) @ v, query, key, value, mask)


def skyformer(query, key, value, landmark_indices, mask=None, scale=None, gamma=0.1):
    """With the given rows of [query; key] as landmarks, and numpy's own solver."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, _, heads, _ = query.shape
    out = np.zeros_like(query)
    for b in range(batch):
        real = slice(None) if mask is None else np.asarray(mask[b])
        for h in range(heads):
            rows = np.concatenate([query[b, :, h], key[b, :, h]])[np.asarray(landmark_indices[b])]
            m = gaussian_kernel(rows, rows, scale) + gamma * np.eye(len(rows))
            context = gaussian_kernel(rows, key[b, real, h], scale) @ value[b, real, h]
            out[b, :, h] = gaussian_kernel(query[b, :, h], rows, scale) @ np.linalg.solve(
                m, context
            )
    return out


REFERENCES = {"softmax": softmax, "kernelized": kernelized}


def assert_directional_derivatives(gradients, reference_loss, args, rng, *, tolerance):
    """Each gradient along a random direction against central differences of the reference."""
    args = [np.asarray(x, np.float64) for x in args]
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=args[i].shape)
        sides = []
        for sign in (1, -1):
            moved = list(args)
            moved[i] = args[i] + sign * 1e-5 * direction
            sides.append(reference_loss(*moved))
        expected = (sides[0] - sides[1]) / 2e-5
        got = float((np.asarray(gradient, np.float64) * direction).sum())
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
