"""The data sets: a room for each, and beside them what they share."""
