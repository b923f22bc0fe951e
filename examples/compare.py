"""Two objectives compared from one warm start, and the picture of both."""

from aspo_jax.library import configure
from aspo_jax.run.figures import dynamics
from aspo_jax.run.metrics import read_metrics
from aspo_jax.train import train

runs = {}
for rule in ("aspo", "dapo"):
    train(configure("countdown_tiny", f"Objective.name={rule}", f"Run.folder=runs/tiny-{rule}"))
    runs[rule] = read_metrics(f"runs/tiny-{rule}/metrics.jsonl")
dynamics(runs, "compared.png")
for rule, rows in runs.items():
    scores = [row["evaluate/avg"] for row in rows if "evaluate/avg" in row]
    print(f"{rule}: held-out avg@8 {scores[0]:.3f} -> {scores[-1]:.3f}")
