"""Four answers to each of two chat prompts, sampled from a Hugging Face model.

Run it where a folder `model` lies. The same call draws the same answers.
"""

from aspo_jax.library import chat, load, sample

model = load("model")
questions = ["3 4:7", "2 9:7"]
prompts = [chat(model, question) for question in questions]
answers = sample(model, prompts, 4, max_tokens=16, temperature=0.7, seed=1)
for question, group in zip(questions, answers, strict=True):
    print(question)
    for answer in group:
        mean = answer.completion.logp_T.mean()
        print(f"  {answer.text!r:24} {answer.completion.ending}, mean log p {mean:.3f}")
