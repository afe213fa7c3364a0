"""Independent reference implementations of the attentions in plain float64 NumPy."""

import numpy as np


def gaussian_kernel(x, y, scale):
    """Gaussian kernel of x [a, p] and y [b, p] as [a, b], computed from explicit differences."""
    return np.exp(-scale / 2 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1))


def per_head(function, query, key, value, mask=None):
    """Applies function(q, k, v) -> out to each example and head, with unmasked keys only."""
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


def kernelized(query, key, value, mask=None, scale=None, normalize=False):
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def one(q, k, v):
        kernel = gaussian_kernel(q, k, scale)
        return kernel @ v / (kernel.sum(axis=1, keepdims=True) if normalize else 1)

    return per_head(one, query, key, value, mask)


def skyformer(query, key, value, landmark_indices, mask=None, scale=None, gamma=0.1):
    """Skyformer with the given rows of [query; key] as landmarks, solved by np.linalg.solve."""
    rows = np.concatenate([query, key], axis=1).astype(np.float64)
    landmarks = [rows[b, np.asarray(indices)] for b, indices in enumerate(landmark_indices)]
    return skyformer_from(query, key, value, landmarks, mask, scale, gamma)


def skyformer_from(query, key, value, landmarks, mask=None, scale=None, gamma=0.1, normalize=False):
    """Skyformer with explicit landmarks [batch, d, heads, head_dim]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, _, heads, _ = query.shape
    out = np.zeros_like(query)
    for b in range(batch):
        real = slice(None) if mask is None else np.asarray(mask[b])
        for h in range(heads):
            rows = np.asarray(landmarks[b], np.float64)[:, h]
            m = gaussian_kernel(rows, rows, scale) + gamma * np.eye(len(rows))
            values = value[b, real, h]
            values = np.concatenate([values, np.ones_like(values[:, :1])], axis=1)
            context = np.linalg.solve(m, gaussian_kernel(rows, key[b, real, h], scale) @ values)
            near = gaussian_kernel(query[b, :, h], rows, scale)
            found = near @ context
            sums = np.maximum(found[:, -1:], 1e-2 * (near @ np.abs(context[:, -1:])))
            out[b, :, h] = (
                found[:, :-1] / np.where(sums > 0, sums, 1) if normalize else found[:, :-1]
            )
    return out


def shared_query_key_softmax(query, value, mask=None, scale=1.0):
    """Reformer with one bucket: keys are normalized queries; a lone token attends to itself."""
    return reformer(query, value, None, mask=mask, scale=scale)


def segments(real, count):
    """Splits the True positions of real into `count` runs of nearly equal size."""
    positions = np.flatnonzero(real)
    ranks = np.arange(len(positions)) * count // len(positions)
    return [positions[ranks == i] for i in range(count)]


def nystromformer(query, key, value, num_landmarks, mask=None, query_mask=None):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    for b in range(len(query)):
        real = np.ones(key.shape[1], bool) if mask is None else np.asarray(mask[b])
        real_query = real if query_mask is None else np.asarray(query_mask[b])
        count = min(num_landmarks, real.sum(), real_query.sum())
        if not count:
            continue
        for h in range(query.shape[2]):
            q, k, v = query[b, :, h], key[b, :, h], value[b, :, h]
            q_means = np.stack([q[rows].mean(0) for rows in segments(real_query, count)])
            k_means = np.stack([k[rows].mean(0) for rows in segments(real, count)])
            first, middle, last = (
                weights(q.shape[-1] ** -0.5 * x @ y.T)
                for x, y in ((q, k_means), (q_means, k_means), (q_means, k[real]))
            )
            out[b, :, h] = first @ np.linalg.pinv(middle) @ last @ v[real]
    return out


def weights(scores):
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def linformer(query, key, value, key_projection, value_projection, mask=None):
    """Linformer; the projections are [heads, length, features]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    if mask is not None:
        key, value = (np.where(np.asarray(mask)[:, :, None, None], x, 0) for x in (key, value))
    key = np.einsum("bnhp,hnk->bkhp", key, np.asarray(key_projection, np.float64))
    value = np.einsum("bnhp,hnk->bkhp", value, np.asarray(value_projection, np.float64))
    return softmax(query, key, value)


def performer(query, key, value, projection, mask=None):
    projection = np.asarray(projection, np.float64)

    def features(x):
        x = x * x.shape[-1] ** -0.25
        return np.exp(x @ projection.T - (x**2).sum(axis=1, keepdims=True) / 2)

    def one(q, k, v):
        scores = features(q) @ features(k).T
        return scores / scores.sum(axis=1, keepdims=True) @ v

    return per_head(one, query, key, value, mask)


def informer(query, key, value, samples, num_active, mask=None):
    """Informer; samples holds the positions of the sampled keys of each example."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = softmax(query, key, value, mask)
    for b in range(len(query)):
        real = np.ones(key.shape[1], bool) if mask is None else np.asarray(mask[b])
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, samples[b], h].T
            measure = np.where(real, scores.max(axis=1) - scores.mean(axis=1), -np.inf)
            others = np.argsort(-measure, kind="stable")[num_active:]
            out[b, others, h] = value[b, real, h].mean(axis=0)
    return out


def reformer(query, value, rotations, mask=None, scale=1.0, factors=(1,), chunk_length=None):
    """Reformer from the sets P_i of attended keys and their union over hash rounds.

    Args:
      query: also the key, before normalization; [batch, length, heads, head_dim].
      value: [batch, length, heads, value_dim].
      rotations: [rounds, head_dim, columns]; None for one round and one bucket.
      mask: bool [batch, length], or None.
      scale: factor of the scores; None for 1 / sqrt(head_dim).
      factors: number of buckets of each hash. The hashes are the digits of the bucket's number,
        the least significant first.
      chunk_length: tokens per chunk; None for the whole sequence.
    """
    query, value = (np.asarray(x, np.float64) for x in (query, value))
    batch, length, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    chunk_length = length if chunk_length is None else chunk_length
    rounds = 1 if rotations is None else len(rotations)
    out = np.zeros_like(value)
    for b in range(batch):
        real = np.arange(length) if mask is None else np.flatnonzero(np.asarray(mask[b]))
        for h in range(heads):
            q, v = query[b, real, h], value[b, real, h]
            scores = scale * q @ (q / np.linalg.norm(q, axis=1, keepdims=True)).T
            attended = np.zeros((len(real), len(real)), bool)
            for r in range(rounds):
                buckets = np.zeros(len(real), int)
                digit, column = 1, 0
                for factor in factors if factors != (1,) else ():
                    of_hash = np.asarray(rotations[r], np.float64)[:, column : column + factor // 2]
                    hashes = np.concatenate([q @ of_hash, -q @ of_hash], axis=1).argmax(axis=1)
                    buckets += digit * hashes
                    digit, column = digit * factor, column + factor // 2
                slots = np.argsort(np.argsort(buckets, kind="stable"), kind="stable")
                behind = slots[:, None] // chunk_length - slots[None, :] // chunk_length
                near = (behind == 0) | (behind == 1)
                attended |= near & (buckets[:, None] == buckets[None, :])
            others = attended & ~np.eye(len(real), dtype=bool)
            for i in range(len(real)):
                rows = others[i] if others[i].any() else attended[i]
                out[b, real[i], h] = (weights(scores[i : i + 1, rows]) @ v[rows])[0]
    return out


def masked_softmax(query, key, value, allowed):
    """Softmax attention where allowed, bool [batch, q_length, kv_length]; zeros without any key."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query.shape[-1] ** -0.5 * np.einsum("bqhp,bkhp->bhqk", query, key)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True)) * allowed[:, None]
    total = scores.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhp->bqhp", scores / np.where(total, total, 1), value)


REFERENCES = {"softmax": softmax, "kernelized": kernelized}


def assert_directional_derivatives(gradients, reference_loss, args, rng, *, tolerance):
    """Checks each gradient along a random direction against central differences of the loss."""
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
