"""Slow and simple answers that fast solvers are compared with."""
