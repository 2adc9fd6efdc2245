"""One file a stage kind: what it loads, its step, what it writes."""
