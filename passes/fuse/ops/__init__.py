"""Composite ops that fusions put in the place of chains: one node, forward and backward in plain torch ops, little kept."""
