"""Heads with their losses as one op: a projection to classes and the cross-entropy of its rows, in chunks of rows."""
