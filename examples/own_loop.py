"""A loop of one's own: collect, assemble, update, with a view of every array.

Run it where a folder `model` lies, such as a run of countdown_tiny leaves.
"""

from aspo_jax.build import build_machines
from aspo_jax.library import configure, start
from aspo_jax.parts import parts
from aspo_jax.rollout import assemble, collect
from aspo_jax.sampler import TRAIN

config = configure("countdown_tiny", "Model.path=model")
mesh = start(config)
m = build_machines(config, parts(config, mesh), "model", mesh)
with m.collector.scorer:
    state = m.learner.init(m.initial_params())
    for i in range(3):
        rollout = collect(m.collector, state.params, next(m.parts.prompts), 8, domain=TRAIN)
        minibatches, figures = assemble(rollout, m.parts.advantage, m.shape)
        for part in map(m.learner.place, minibatches):
            part = m.learner.with_old(state.params, m.reference, part)
            state, report = m.learner.step(state, part)
        print(i, f"reward {figures['rollout/reward_mean']:.3f}", f"updates {state.step}")
for name, x in (vars(part.rows) | vars(part.old)).items():
    print(f"{name:22} {x.dtype!s:8} {x.shape}" if x is not None else f"{name:22} absent")
