#pragma once

namespace mann::cuda {

// Undoing writes rounds, and small rows would drown in what was written to them later: while the steps of a segment are
// recomputed, every so many of them the memory is set aside, to go on from there on the way back.
constexpr int kRestartEvery = 8;

} // namespace mann::cuda
