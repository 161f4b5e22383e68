"""shardwright.passes."""
