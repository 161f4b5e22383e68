"""shardwright.cli."""
