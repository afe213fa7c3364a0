"""Data sets: generators, readers of the published files, TFDS builders, batching."""
