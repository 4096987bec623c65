"""How much of a cached prefix is used and how much of a prompt is kept: one policy per file."""
