#!/usr/bin/env bash
# Builds csrc/tests with each sanitizer and runs it; the CUDA part runs on the fake driver.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
# The thread sanitizer does not work with every address space layout.
fixed_layout=()
setarch -R true 2>/dev/null && fixed_layout=(setarch -R)
trap 'rm -rf "$folder"' EXIT

build() {
  "${CXX:-g++}" -std=c++17 -O1 -g -pthread -Wall -Wextra -fsanitize="$sanitizer" \
    -fno-sanitize-recover=all "$@"
}

check() {
  echo "$1 under -fsanitize=$sanitizer: $("${fixed_layout[@]}" "$folder/$1" || echo failed)" |
    tee "$folder/out"
  grep -q ': ok$' "$folder/out"
}

for sanitizer in address,undefined thread; do
  build csrc/tests/host_copy_test.cpp csrc/host_copy.cpp -o "$folder/host_copy_test"
  check host_copy_test
  build -fPIC -shared -fvisibility=hidden csrc/tests/fake_cuda/*.cpp -o "$folder/libcuda.so.1" &
  fake=$!
  build csrc/tests/cuda_queue_test.cpp csrc/cuda_{driver,device,queue}.cpp -ldl \
    -o "$folder/cuda_queue_test"
  wait "$fake"
  LD_LIBRARY_PATH="$folder" DWDP_FAKE_CUDA_MAX_DELAY_US=200 check cuda_queue_test
done
