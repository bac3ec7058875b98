"""Training one stage or a whole rack in memory, and judging it."""
