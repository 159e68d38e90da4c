"""Scores of a run's SAEs, a file for each subject of the notebooks: rows in, rows out, kept under ids."""
