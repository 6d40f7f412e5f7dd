#!/usr/bin/env bash
# Builds csrc/tests with each sanitizer and runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
# The thread sanitizer does not work with every address space layout.
fixed_layout=()
setarch -R true 2>/dev/null && fixed_layout=(setarch -R)
trap 'rm -rf "$folder"' EXIT
for sanitizer in address,undefined thread; do
  "${CXX:-g++}" -std=c++17 -O1 -g -pthread -Wall -Wextra -fsanitize="$sanitizer" \
    -fno-sanitize-recover=all csrc/tests/host_copy_test.cpp csrc/host_copy.cpp -o "$folder/test"
  echo "host_copy_test under -fsanitize=$sanitizer: $("${fixed_layout[@]}" "$folder/test" || echo failed)" |
    tee "$folder/out"
  grep -q ': ok$' "$folder/out"
done
