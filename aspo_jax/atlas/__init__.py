"""The atlas: what each objective does to one token, as numbers (`views`) and as pictures."""
