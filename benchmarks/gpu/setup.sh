#!/bin/bash
# Lays what bring.py fetched beside the packages of a GPU machine, without a network; run in the repository's root.
#
#   WHEELS=wheels bash benchmarks/gpu/setup.sh && source /tmp/gpu_env.sh
#
# SITE (/tmp/site) takes the packages, ENVIRONMENT (/tmp/gpu_env.sh) the variables that a shell needs, PYTHON (python3)
# is the interpreter that has torch.
set -eu
WHEELS=${WHEELS:?folder that bring.py filled}
SITE=${SITE:-/tmp/site} ENVIRONMENT=${ENVIRONMENT:-/tmp/gpu_env.sh} PYTHON=${PYTHON:-python3}
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$SITE"

# Megatron-Core from source, and the only C++ file of its data sets. It compiles while the wheels are laid out.
tar -xzf "$WHEELS"/megatron_core-*.tar.gz -C "$SITE" --strip-components=1 --wildcards '*/megatron'
helpers=$SITE/megatron/core/datasets
(
    includes=$("$PYTHON" -m pybind11 --includes)
    suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    # shellcheck disable=SC2086 # several words
    g++ -O2 -shared -std=c++17 -fPIC $includes "$helpers/helpers.cpp" -o "$helpers/helpers_cpp$suffix"
) >"$SITE/helpers.log" 2>&1 &
compiling=$!

"$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl

# Imported by NeMo, called by nothing here: files that hold the names it asks for.
stub() { [ -e "$SITE/$1" ] || { mkdir -p "$(dirname "$SITE/$1")" && cat >"$SITE/$1"; }; }
stub jieba.py <<<'"""Chinese words: NeMo imports it for its processor of Chinese text."""'
stub opencc.py <<<'"""Chinese characters: NeMo imports OpenCC for the same."""
OpenCC = None'
stub wget.py <<<'"""Downloads: NeMo imports it for its own checkpoints."""'
# Lightning asks mpi4py, where there is one, for the number of processes, and stops where MPI itself is missing.
stub mpi4py/__init__.py <<<'"""One process."""'
stub mpi4py/MPI.py <<<'"""One process."""
class COMM_WORLD:
    Get_size = staticmethod(lambda: 1)'

if ! wait $compiling; then
    echo "helpers.cpp did not compile, data sets of Megatron-Core will not be read: $(tail -1 "$SITE/helpers.log")"
    stub megatron/core/datasets/helpers_cpp.py <<<'"""Stands for the file that did not compile."""'
fi

# a machine that has JAX: nobody is to take the GPU's memory for it
echo "export PYTHONPATH=$SITE:$REPOSITORY PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu USE_JAX=0 USE_TF=0" >"$ENVIRONMENT"
source "$ENVIRONMENT"
"$PYTHON" -W ignore "$REPOSITORY/benchmarks/gpu/versions.py"
echo "setup: $SECONDS s; source $ENVIRONMENT"
