"""What vLLM asks once it knows a pruned model's configuration: what to switch on, and what cannot be served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..methods.tokens import ATTENTION
from .settings import Settings, uses_m_rope


def always() -> bool:
    """Whether embeddings bring positions, as a server is asked. A function of a module: it can be pickled."""
    return True


class Checks:
    """The entry of pruned models in vLLM's MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Have the runner keep a table of positions for each request, and ask for it again behind the encoder."""
        config, multimodal = model_config.hf_config, model_config.multimodal_config
        settings = Settings.parse(getattr(config, "foveate", None))
        if "foveate" in (multimodal.mm_processor_kwargs or {}):
            raise ValueError(
                "a server's options are given as --hf-overrides '{\"foveate\": ...}', not as processor options"
            )
        m_rope = uses_m_rope(model_config)
        settings.check_model(config, m_rope)
        if settings.positions == "compact":
            return
        if not m_rope:
            # Read at the top of the configuration only: the language model, built from the text's, keeps its RoPE.
            config.mrope_section = [1, 1, 1]
            config.foveate_one_coordinate = True
        # vLLM's switch for pruning films would change their prompts.
        multimodal.is_multimodal_pruning_enabled = always

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot be served.

        Raises:
            ValueError: naming each of these options, and the way out.
        """
        settings = Settings.parse(vllm_config.model_config.hf_config.foveate)
        if refused := list(unserved(vllm_config, settings)):
            raise ValueError(f"foveate cannot serve with {'; '.join(refused)}")


def unserved(vllm_config: Any, settings: Settings) -> Iterator[str]:
    """The options of a server under which pruning would be wrong, each with the reason and the way out."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    multimodal = vllm_config.model_config.multimodal_config
    if getattr(compilation, "cudagraph_mm_encoder", False):
        yield "cudagraph_mm_encoder, whose replays show nothing of the encoder: leave it off"
    if getattr(compilation, "compile_mm_encoder", False):
        yield "compile_mm_encoder, which hides the encoder's layers: leave it off"
    if multimodal.mm_encoder_tp_mode == "data" and settings.method.reads & (ATTENTION | {"states"}):
        yield (
            f"--mm-encoder-tp-mode data, where a rank sees some pictures only and {settings.method.name} reads the "
            "encoder: leave it out, or take a method that reads features only, such as divprune"
        )
    if parallel.pipeline_parallel_size > 1:
        yield "--pipeline-parallel-size, as later stages would not learn positions: use --tensor-parallel-size"
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        yield "LoRA on the vision encoder, whose tokens it counts: give adapters to the language model only"
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"):
        yield f"speculative decoding by {speculative.method}, which reads positions one token ahead: use ngram"
