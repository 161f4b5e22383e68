"""Sparse updates: the most valuable set within a budget, what a backward pass keeps for it, and steps that update it alone."""

from __future__ import annotations
