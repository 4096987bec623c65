"""Which instance gets a request: one policy per file."""
