"""avg@k and pass@k of a model on a JSON-lines file, without training.

Run it where a folder `model` and a file `questions.jsonl` lie, one object a line:
{"prompt": "3 4:7", "answer": {"numbers": [3, 4], "target": 7, "operations": "+-"},
 "kind": "countdown"}   (on one line)
"""

from aspo_jax.library import evaluate, load

scores, rollout = evaluate(load("model"), "questions.jsonl", samples=8, max_tokens=16)
print(f"avg@8 {scores['avg']:.3f} +- {scores['avg_stderr']:.3f}, pass@8 {scores['pass_any']:.3f}")
for sample in rollout.samples[:8]:
    print(f"  {sample.text!r:24} {sample.verdict.reason}, reward {sample.verdict.reward:g}")
