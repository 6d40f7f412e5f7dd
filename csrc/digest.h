// The sums of which `device/digest.py` makes a shard's digest, over host memory. Stateless: any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dwdp {

// Two sums for each piece of `piece_words` words, of which the last may be shorter.
//
// `keys` are four rows of `piece_words`: the first lane's for whole words and for upper halves, then the
// second's. `sums` has room for two words a piece.
void sum_pieces(const std::uint64_t* words, std::size_t num_words, const std::uint64_t* keys,
                std::size_t piece_words, std::uint64_t* sums);

}  // namespace dwdp
