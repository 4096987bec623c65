"""In which order cached KV blocks that nobody uses are given up: one policy per file."""
