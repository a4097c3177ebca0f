"""Ask glimpse about a picture with most of its tokens gone: `python examples/prune.py`."""

from pathlib import Path

from PIL import Image

import foveate
from foveate import glimpse

model, processor = glimpse.load()
content = [
    {"type": "image", "image": Image.open(Path(__file__).with_name("demo.png"))},
    {"type": "text", "text": "What is at the top right?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
with foveate.prune(model, "plphp", keep=0.4) as pruned:
    out = model.generate(**inputs, max_new_tokens=64)

print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(pruned.report)
