"""The report: what the scripts of experiments/ measured, beside what the paper printed."""
