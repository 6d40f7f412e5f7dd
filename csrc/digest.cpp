#include "digest.h"

#include <algorithm>

namespace dwdp {

void sum_pieces(const std::uint64_t* words, std::size_t num_words, const std::uint64_t* keys,
                std::size_t piece_words, std::uint64_t* sums) {
  const std::uint64_t* rows[4];
  for (std::size_t row = 0; row < 4; ++row) rows[row] = keys + row * piece_words;
  for (std::size_t start = 0; start < num_words; start += piece_words) {
    const std::uint64_t* piece = words + start;
    const std::size_t length = std::min(piece_words, num_words - start);
    std::uint64_t first = 0, second = 0;
    for (std::size_t index = 0; index < length; ++index) {
      const std::uint64_t word = piece[index];
      // With the sign's bits above it, as torch shifts, which has no unsigned shift.
      const auto upper = static_cast<std::uint64_t>(static_cast<std::int64_t>(word) >> 32);
      first += word * rows[0][index] + upper * rows[1][index];
      second += word * rows[2][index] + upper * rows[3][index];
    }
    *sums++ = first;
    *sums++ = second;
  }
}

}  // namespace dwdp
