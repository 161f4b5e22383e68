"""shardwright.cli.report."""
