#!/usr/bin/env bash
# Builds csrc/tests with each sanitizer and runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for sanitizer in address,undefined thread; do
  "${CXX:-g++}" -std=c++17 -O1 -g -pthread -Wall -Wextra -fsanitize="$sanitizer" \
    -fno-sanitize-recover=all csrc/tests/host_copy_test.cpp csrc/host_copy.cpp -o "$folder/test"
  # The thread sanitizer cannot work with every address space layout.
  echo "host_copy_test under -fsanitize=$sanitizer: $(setarch -R "$folder/test" || echo failed)" |
    tee "$folder/out"
  grep -q ': ok$' "$folder/out"
done
