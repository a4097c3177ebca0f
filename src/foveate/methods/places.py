"""The places where methods act, in the order in which a prompt meets them, each in words."""

PLACES = {
    "encoder": "before the LLM",
    "layer": "inside the LLM",
    "cache": "in the KV cache",
    "cross": "in cross-attention",
    "logits": "in a second run beside the LLM",
}
