"""shardwright.runtime."""
