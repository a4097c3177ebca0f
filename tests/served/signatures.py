"""Does a release of vLLM still have what the plugin overrides, calls or patches, word for word?

    python tests/served/signatures.py                # the newest wheel of vllm
    python tests/served/signatures.py vllm==0.33.0   # or another
    python tests/served/signatures.py WHEEL --accept # what was looked at: its functions are known from now on

Downloads a wheel without what it needs, and reads its source; nothing of it is run. Exit status 1 where something is
gone or reads otherwise than in every release that was looked at: then `make test-vllm` on that release, and a look at
what changed, come before a wider `VERSIONS`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).with_name("signatures.json")
# File of vllm -> classes, functions and methods in it.
WATCHED = {
    "config/model.py": ["ModelConfig._apply_dict_overrides", "ModelConfig.uses_mrope"],
    "config/multimodal.py": ["MultiModalConfig.is_multimodal_pruning_enabled"],
    "multimodal/encoder_budget.py": ["MultiModalBudget._get_max_items", "get_mm_max_toks_per_item"],
    "multimodal/inputs.py": ["MultiModalFieldElem", "MultiModalBatchedField", "PlaceholderRange"],
    "multimodal/processing/inputs.py": ["ProcessorInputs"],
    "multimodal/processing/processor.py": [
        "PromptUpdateDetails",
        "ResolvedPromptUpdate",
        "BaseMultiModalProcessor.__init__",
        "BaseMultiModalProcessor.apply",
        "BaseMultiModalProcessor.get_dummy_mm_inputs",
        "BaseMultiModalProcessor._get_mm_hashes",
        "BaseMultiModalProcessor._get_mm_prompt_updates",
        "BaseMultiModalProcessor._merge_mm_kwargs",
        "BaseMultiModalProcessor._maybe_apply_prompt_updates",
        "BaseMultiModalProcessor._cached_apply_hf_processor",
    ],
    "multimodal/registry.py": ["MultiModalRegistry.register_processor", "_ProcessorFactories"],
    "model_executor/layers/attention/mm_encoder_attention.py": ["MMEncoderAttention.__init__"],
    "model_executor/layers/rotary_embedding/base.py": ["RotaryEmbeddingBase.__init__"],
    "model_executor/models/config.py": ["VerifyAndUpdateConfig"],
    "model_executor/models/interfaces.py": ["SupportsMRoPE", "SupportsMultiModalPruning"],
    "model_executor/models/registry.py": ["_ModelRegistry.register_model", "_try_load_model_cls"],
    "model_executor/models/qwen2_vl.py": ["Qwen2VLForConditionalGeneration.get_mrope_input_positions"],
    "model_executor/models/qwen2_5_vl.py": ["Qwen2_5_VLForConditionalGeneration.embed_multimodal"],
    "model_executor/models/qwen3_vl.py": ["Qwen3VLForConditionalGeneration.embed_multimodal", "mrope_positions_factor"],
    "model_executor/models/llava.py": ["LlavaForConditionalGeneration.embed_multimodal"],
    "model_executor/models/llava_next.py": ["LlavaNextForConditionalGeneration.embed_multimodal"],
    "model_executor/models/llava_onevision.py": ["LlavaOnevisionForConditionalGeneration.embed_multimodal"],
    "model_executor/models/interns1.py": ["InternS1ForConditionalGeneration.embed_multimodal"],
    "model_executor/models/idefics3.py": ["Idefics3ForConditionalGeneration.embed_multimodal"],
    "model_executor/models/idefics2_vision_model.py": ["Idefics2VisionAttention.forward"],
    "model_executor/models/mistral3.py": [
        "Mistral3MultiModalProcessor._get_prompt_updates",
        "Mistral3ForConditionalGeneration.embed_multimodal",
    ],
    "v1/worker/cpu_model_runner.py": ["CPUModelRunner.load_model"],
    "v1/worker/gpu_model_runner.py": [
        "GPUModelRunner._init_mrope_positions",
        "GPUModelRunner._gather_mm_embeddings",
        "GPUModelRunner._calc_mrope_positions",
    ],
    "v1/worker/gpu/model_states/mm_pruning.py": ["MultiModalPruner", "maybe_create_mm_pruner"],
}


def found(source: str, name: str) -> ast.AST | None:
    """The class, function or method of this dotted name."""
    node: ast.AST | None = ast.parse(source)
    for part in name.split("."):
        inside = ast.iter_child_nodes(node) if node is not None else ()
        node = next((child for child in inside if getattr(child, "name", None) == part), None)
    return node


def mark(node: ast.AST) -> str:
    """Of what a definition says, whatever its comments and docstrings are."""
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    empty: dict[str, Any] = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    # Younger Pythons write down more of the same.
    words = ast.dump(node, **empty).replace(", type_params=[]", "")
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def marks(wheel: Path) -> dict[str, str]:
    """By `file:name`, of everything that is watched; "" for what is gone."""
    read = {}
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        for file, names in WATCHED.items():
            path = f"vllm/{file}"
            source = archive.read(path).decode() if path in files else ""
            for name in names:
                node = found(source, name)
                read[f"{file}:{name}"] = "" if node is None else mark(node)
    return read


def fetched(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded; or the file of that name."""
    if Path(requirement).is_file():
        return Path(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    return next(folder.glob("*.whl"))


def main(words: list[str]) -> int:
    accept = "--accept" in words
    requirement = next((word for word in words if not word.startswith("--")), "vllm")
    known: dict[str, dict[str, str]] = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetched(requirement, Path(folder))
        version, now = wheel.name.split("-")[1], marks(wheel)
    if accept:
        known[version] = now
        KNOWN.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    moved = [
        name for name, is_now in now.items() if not is_now or is_now not in {old.get(name) for old in known.values()}
    ]
    for name in moved:
        print(f"{'gone' if not now[name] else 'changed'}: {name}")
    print(f"vllm {version}: {len(now) - len(moved)} of {len(now)} are as in {', '.join(known)}")
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
