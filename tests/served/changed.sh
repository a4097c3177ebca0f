#!/usr/bin/env bash
# Runs `make test-vllm` where it has something new to say: where the plugin, or what it uses, is not what it was when
# these tests last passed on this machine. Where vLLM for the CPU cannot be installed, it says so and stops: the suite
# tests the plugin's own arithmetic and options without vLLM.
set -euo pipefail
cd "$(dirname "$0")/../.."
parts=(src/foveate/vllm src/foveate/families src/foveate/methods src/foveate/layout.py src/foveate/commands/serve.py
    tests/served pyproject.toml)
state=$(find "${parts[@]}" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 cat | sha256sum | cut -d' ' -f1)
passed="${XDG_CACHE_HOME:-$HOME/.cache}/foveate/vllm-tests-passed"
if [[ -f $passed && $(<"$passed") == "$state" ]]; then
    echo "the vLLM plugin and what it uses are as when its tests last passed here"
    exit
fi
if ! timeout 600 make installed-vllm; then
    echo "vLLM for the CPU cannot be installed here: the plugin is not tested in vLLM itself"
    exit
fi
make test-vllm VLLM_TESTS="-m 'not slow'"
mkdir -p "$(dirname "$passed")"
echo "$state" >"$passed"
