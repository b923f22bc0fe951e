"""A run on disk and in the terminal: its folder, log, checkpoints, console, and how it stops."""
