"""A tiny provider of pieces: real two-player training in milliseconds, for the runner's own tests."""
