"""Where a request computes its prompt and where it decodes: one policy per file."""
