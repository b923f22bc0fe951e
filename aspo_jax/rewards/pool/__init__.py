"""Grader processes that can be killed, and the queue of answers in front of them."""
