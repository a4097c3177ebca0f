"""A vLLM plugin: serve models whose prompts hold fewer image tokens.

    vllm serve MODEL --hf-overrides '{"foveate": {"method": "fopru", "keep": 0.25}}'

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. Importing
foveate, or this package, does not import vLLM.
"""

from __future__ import annotations

from .settings import PREFIX, SERVED, VERSIONS, supported


def register() -> None:
    """Make the pruned models known to vLLM, in this process; called again, it changes nothing more.

    Under a vLLM outside of the tested range nothing is registered, and asking for foveate is refused.
    """
    from importlib.metadata import version

    from vllm import __version__

    from .patches import follow_overrides, refuse_overrides

    if not supported(__version__):
        refuse_overrides(
            f"foveate {version('foveate')} serves with vllm{VERSIONS} and this is vllm {__version__}: install one of "
            "those, or leave foveate out of --hf-overrides"
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import Checks
    from .patches import count_by_lowest, mend_cpu_runner

    release = __version__.replace(".", "_").replace("+", "_")
    for architecture in SERVED:
        # vLLM remembers on disk what a class of this name can do, whatever its own version is.
        ModelRegistry.register_model(PREFIX + architecture, f"foveate.vllm.models:{PREFIX}{architecture}_on_{release}")
        MODELS_CONFIG_MAP[PREFIX + architecture] = Checks
    follow_overrides()
    count_by_lowest()
    mend_cpu_runner()
