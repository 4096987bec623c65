"""One HTTP server before several vLLM engines, filled by our routing policies."""
