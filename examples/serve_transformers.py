"""An OpenAI-compatible server of transformers over a pruned model.

pip install "transformers[serving]"
python examples/serve_transformers.py llava-hf/llava-1.5-7b-hf --method divprune --keep 0.25 --port 8000
"""

import argparse

from transformers.cli.serve import Serve

import foveate


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id or a folder")
    parser.add_argument("--method", default="divprune", help="as foveate.prune takes it")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of each image's tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = Serve(force_model=options.model, device=options.device, port=options.port, non_blocking=True)
    try:
        # The server has no argument for a model that is loaded already: it is pruned where it was put.
        (held,) = server._model_manager.loaded_models.values()
        foveate.prune(held.model, options.method, keep=options.keep)
        print(f"{options.method} keep={options.keep} on port {options.port}", flush=True)
        server._thread.join()
    except KeyboardInterrupt:
        pass
    finally:
        server.kill_server()


if __name__ == "__main__":
    main()
