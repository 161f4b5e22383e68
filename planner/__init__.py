"""shardwright.planner."""
