"""A plan in the words of other tools (docs/export.md): one file per target, each a table of that tool's names."""
