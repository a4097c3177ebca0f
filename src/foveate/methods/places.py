"""The places where methods act, in the order in which a prompt meets them, each in words."""

PLACES = {
    "encoder": "before the LLM",
    "layer": "inside the LLM",
    "depth": "around layers of the LLM",
    "cache": "in the KV cache",
    "decode": "in what a decoding step reads",
    "cross": "in cross-attention",
    "logits": "in a second run beside the LLM",
}
