"""Is the simulator right? Theory, measurements of others, and a real engine beside it."""
