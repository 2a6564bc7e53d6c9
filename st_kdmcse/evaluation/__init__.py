"""Evaluation of sentence encoders: STS and transfer tasks, alignment and uniformity, comparison of runs, plots."""
