"""Log-probabilities and entropies of texts under a Hugging Face model.

Run it where a folder `model` lies: config.json, tokenizer.json, safetensors.
"""

from aspo_jax.library import load, score

model = load("model")
texts = ["1+2=3", "1+2=4"]
for text, found in zip(texts, score(model, texts), strict=True):
    print(f"{text!r}: {found.logp_T.sum():.2f} nats in {len(found.logp_T)} predicted tokens")
    for token, logp, entropy in zip(found.tokens_L[1:], found.logp_T, found.entropy_T, strict=True):
        print(f"  {model.policy.decode([token])!r:12} log p {logp:7.3f}   entropy {entropy:6.3f}")
