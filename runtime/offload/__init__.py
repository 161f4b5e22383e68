"""What a plan keeps behind the device, in host memory or on disk, while it runs (docs/offload.md)."""
