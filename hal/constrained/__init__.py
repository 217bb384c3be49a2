"""Constrained output: what a request may answer, as token masks that the host computes for each step."""
