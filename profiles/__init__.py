"""shardwright.profiles."""
