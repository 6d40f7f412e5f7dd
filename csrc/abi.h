// What the files of the C ABI share: visibility and error passing.
#pragma once

#include <exception>
#include <string>

#define DWDP_API extern "C" __attribute__((visibility("default")))

namespace dwdp::abi {

std::string& last_error();  // of the calling thread

// Runs `action`; 0, or -1 with `last_error` set.
template <typename Action>
int guarded(Action action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return -1;
  }
}

}  // namespace dwdp::abi
