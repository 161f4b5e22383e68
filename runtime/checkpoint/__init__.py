"""State on disk: blocks of tensors in safetensors files, JSON metadata, and folders that are whole or absent."""
