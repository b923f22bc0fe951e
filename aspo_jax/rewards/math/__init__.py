"""Grading mathematics: the final answer of a text, and whether it equals the gold one."""
