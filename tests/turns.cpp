// Exercises turns.h by itself: threads claim blocks and append to lists in turn. Status 0 if every list is in order.
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "turns.h"

namespace {

constexpr int64_t kHeads = 3, kBlocks = 12, kTiles = 4;

// Blocks reach fewer tiles the later they come, as causal ones do.
int64_t reach(int64_t n) { return kTiles - n * kTiles / kBlocks; }

// One run; whether all that must hold holds. `fails` is the block of head 1 that throws, -1 for none.
bool run(int threads, int64_t fails, unsigned seed) {
  gumbel::Claims claims(kHeads, kBlocks);
  gumbel::Turns turns(kHeads * kTiles);
  std::vector<std::vector<int64_t>> lists(kHeads * kTiles);
  std::atomic<int> errors{0};
  auto work = [&](int id) {
    std::mt19937 random(seed * 97 + id);
    for (gumbel::Claim claim; claims.take(claim);) {
      for (int64_t tile = 0; tile < reach(claim.n); ++tile) {
        for (auto spins = random() % 64; spins > 0; --spins) std::this_thread::yield();
        const int64_t list = claim.head * kTiles + tile;
        turns.take(list, claim.n, [&] {
          if (claim.head == 1 && claim.n == fails && tile == 1) throw std::runtime_error("as told");
          lists[list].push_back(claim.n);
        });
      }
    }
  };
  std::vector<std::thread> all;
  for (int id = 0; id < threads; ++id) {
    all.emplace_back([&, id] {
      try {
        turns.share([&] { work(id); });
      } catch (const std::runtime_error& error) {
        errors += error.what() == std::string("as told") ? 1 : 100;
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  for (int64_t list = 0; list < kHeads * kTiles; ++list) {
    int64_t expected = 0;
    while (expected < kBlocks && list % kTiles < reach(expected)) ++expected;
    const auto size = (int64_t)lists[list].size();
    for (int64_t n = 0; n < size; ++n)
      if (lists[list][n] != n) return false;
    if (fails < 0 && size != expected) return false;
  }
  return errors == (fails < 0 ? 0 : 1);
}

}  // namespace

int main() {
  for (int round = 0; round < 126; ++round) {  // every number of threads with every failing block, and without one
    const int threads = 1 + round % 9;
    const int64_t fails = round % 2 == 0 ? -1 : round % 7;
    if (run(threads, fails, round)) continue;
    std::printf("wrong in round %d, threads %d, failing block %d\n", round, threads, (int)fails);
    return 1;
  }
}
