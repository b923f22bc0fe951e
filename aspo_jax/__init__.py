"""ASPO and its rivals for LLM reinforcement learning, in JAX.

Start with `aspo_jax.losses` (the equations; needs jax alone) or `python -m aspo_jax.train`
(the trainer; `aspo_jax/train.py` is the whole machine on one page).
"""

__version__ = "0.1.0"
