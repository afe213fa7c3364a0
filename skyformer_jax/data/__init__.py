"""The data sets: a module or subpackage for each, and the code that they share."""
