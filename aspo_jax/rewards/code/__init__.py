"""Grading programs: their tests, and the sandbox that each test runs in."""
