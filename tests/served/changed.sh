#!/usr/bin/env bash
# Runs the quick part of `make test-vllm` where it has something new to say: where the plugin, or what it uses, is not
# what it was when these tests last passed on this machine. CI calls it, and has no minutes to install vLLM: without an
# environment that `make installed-vllm` made it says so and stops. The suite tests all that needs no vLLM.
set -euo pipefail
cd "$(dirname "$0")/../.."
served=${1:?where the environment is}
parts=(src/foveate/vllm src/foveate/families src/foveate/methods src/foveate/layout.py src/foveate/commands/serve.py
    tests/served pyproject.toml)
state=$(find "${parts[@]}" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 cat | sha256sum | cut -d' ' -f1)
passed="$served/passed"
if [[ ! -e $served/.tests ]]; then
    echo "no vLLM here (make installed-vllm): the plugin is not tested in vLLM itself"
elif [[ -e $passed && $(<"$passed") == "$state" ]]; then
    echo "the vLLM plugin and what it uses are as when its tests last passed here"
else
    make test-vllm VLLM_TESTS="-m 'not slow'"
    echo "$state" >"$passed"
fi
