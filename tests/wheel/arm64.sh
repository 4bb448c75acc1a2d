#!/bin/sh
# The compiled kernels on arm64 Linux, on a machine that is none: cross-compiled by GCC and run by qemu-user, under an arm64
# Python with torch's wheel for arm64. That is slow, so choose few tests:
#
#     tests/wheel/arm64.sh FOLDER tests/ops/test_cpu_tokens.py -k products
#
# FOLDER, made on the first call, keeps 1 GB: Python and its packages. Needs Debian 13's packages qemu-user,
# g++-aarch64-linux-gnu and mmdebstrap, and a pip; installs nothing outside FOLDER. CXX="clang++ --target=aarch64-linux-gnu"
# takes another compiler.
set -eu
folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/../.."

if [ ! -e "$folder/done" ]; then
    mkdir -p "$folder"
    mmdebstrap --architectures=arm64 --variant=extract --include=python3.13,libpython3.13,libstdc++6 trixie "$folder/root"
    ln -sfn usr/lib "$folder/root/lib"
    # The last torch whose wheel for arm64 is one for CPUs alone, older than ovq allows; the kernels do not depend on it.
    # Named one by one, because pip would look for what they need on this machine.
    python3 -m pip install --no-deps --target "$folder/site" --only-binary :all: --python-version 3.13 \
        --implementation cp --abi cp313 --abi abi3 --abi none --platform manylinux_2_28_aarch64 \
        --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        'torch==2.10.*' accelerate annotated-doc anyio certifi click contourpy cycler filelock fonttools fsspec h11 hf-xet \
        httpcore2 httpx2 huggingface-hub hypothesis idna iniconfig jinja2 kiwisolver markdown-it-py markupsafe matplotlib \
        mdurl mpmath networkx numpy packaging pillow pluggy psutil pygments pyparsing pytest python-dateutil pyyaml regex \
        rich safetensors setuptools shellingham six sortedcontainers sympy tokenizers tqdm transformers truststore typer \
        typing-extensions
    touch "$folder/done"
fi

export PYTHONPATH="$PWD/src:$PWD/lab:$folder/site" XDG_CACHE_HOME="$folder/cache" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# The compiler runs on this machine, which it must not compile for.
export CXX="${CXX:-aarch64-linux-gnu-g++}" OVQ_CPU_KERNELS=arm64
exec qemu-aarch64 -L "$folder/root" "$folder/root/usr/bin/python3.13" -m pytest -p no:cacheprovider "$@"
