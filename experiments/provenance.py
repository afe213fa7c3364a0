"""The old name of a part of records.py; goes once nothing imports it."""

from experiments.records import provenance, write_json

__all__ = ["provenance", "write_json"]
