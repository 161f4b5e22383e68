"""shardwright.runtime.kernels."""
