// How threads share sums without copies of them: who works on which block, and who adds to a sum when.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace gumbel {

// A block of one head: the n-th in the order of its head.
struct Claim {
  int64_t head = -1, n = 0;
};

// Deals out the blocks of all heads to threads that ask for them, those of one head in their order. A thread stays
// with its head, then takes one that is nobody's: threads meet on a head only when there are no others left.
class Claims {
 public:
  Claims(int64_t heads, int64_t blocks)
      : heads_(heads), blocks_(blocks), next_(std::make_unique<std::atomic<int64_t>[]>(heads)) {}

  // Turns `claim`, the last one of this thread, into its next; false if there is none.
  bool take(Claim& claim) {
    if (claim.head >= 0 && take_from(claim.head, claim)) return true;
    for (int64_t head; opened_ < heads_ && (head = opened_++) < heads_;)
      if (take_from(head, claim)) return true;
    for (int64_t head; (head = longest()) >= 0;)
      if (take_from(head, claim)) return true;
    return false;
  }

 private:
  bool take_from(int64_t head, Claim& claim) {
    const int64_t n = next_[head]++;
    if (n < blocks_) claim = {head, n};
    return n < blocks_;
  }
  // The head with most blocks left, -1 if none has any.
  int64_t longest() const {
    int64_t found = -1, least = blocks_;
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t taken = next_[head];
      if (taken < least) found = head, least = taken;
    }
    return found;
  }

  const int64_t heads_, blocks_;
  std::unique_ptr<std::atomic<int64_t>[]> next_;  // block of each head
  std::atomic<int64_t> opened_{0};                // heads
};

// Lets blocks add to a sum one after the other, n = 0, 1, ..., whichever threads they are on. As blocks are claimed in
// this order, the one that is waited for is running or done: some thread can always go on, however many there are.
class Turns {
 public:
  explicit Turns(int64_t sums) : next_(std::make_unique<std::atomic<int64_t>[]>(sums)) {}

  // Runs add() when all before the n-th have added to this sum.
  template <typename F>
  void take(int64_t sum, int64_t n, F&& add) {
    for (int64_t tries = 0; next_[sum].load(std::memory_order_acquire) != n; ++tries) {
      if (stopped_.load(std::memory_order_relaxed)) throw Stopped{};
      if (tries < kSpins) pause();
      else std::this_thread::yield();  // there may be more threads than cores
    }
    add();
    next_[sum].store(n + 1, std::memory_order_release);
  }

  // Runs work(), one thread's share. If it throws, the others no longer wait for it, and end as well.
  template <typename F>
  void share(F&& work) {
    try {
      work();
    } catch (const Stopped&) {  // another thread tells why
    } catch (...) {
      stopped_ = true;
      throw;
    }
  }

 private:
  struct Stopped {};
  static constexpr int64_t kSpins = 1000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::unique_ptr<std::atomic<int64_t>[]> next_;  // whose turn it is, for each sum
  std::atomic<bool> stopped_{false};
};

}  // namespace gumbel
