"""Which waiting request runs next, and whether it may run now: one policy per file."""
