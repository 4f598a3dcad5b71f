// Threads that share a piece of work: the caller, and workers that then wait for the next piece.
//
// OpenMP does not fit: its threads are lost after fork(), it ends the process if a thread cannot be started, and it
// spins while waiting for as long as the environment says. A thread here spins briefly and then sleeps, which leaves
// its core to the thread it waits for. If spinning does not pay (a busy neighbour, more threads than cores) the spins
// get shorter, and longer again once it does.
//
// A team is borrowed for one run() and then kept for later ones, so there are as many teams as ever ran at once. Only
// the first run of a size allocates. After fork() the child makes new teams.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace matquant {

constexpr int MOST_THREADS = 1024;  // in one run; src/matquant/threads.py allows a few per core

// The default number of threads: OMP_NUM_THREADS if it is a positive number, else the cores this process may use.
int default_threads();

class Team {
 public:
  using Call = void (*)(const void* work, Team& team, int thread);

  Team();
  ~Team();
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // A barrier in two halves. arrive: this thread has reached its next barrier. await: returns once all threads have.
  void arrive(int thread);
  void await(int thread);
  void barrier(int thread) {
    arrive(thread);
    await(thread);
  }

  // Runs call(work, team, thread) for thread 0 (the caller) .. threads - 1 and returns when all are done. `call` must
  // not throw. Throws std::runtime_error if a thread cannot be started; then nothing has been called.
  void run(int threads, Call call, const void* work);

 private:
  // State that one thread writes and others wait for, on separate cache lines.
  struct alignas(128) Member {
    std::atomic<unsigned> barriers{0};  // reached in this run
    std::atomic<unsigned> run{0};       // number of the latest run that it takes part in
    // Used by the thread alone: how long it spins at a barrier, and how often it has waited at one.
    std::chrono::nanoseconds patience;
    unsigned waits = 0;
    Member();
  };

  void serve(int thread);
  bool all_at(unsigned count) const;
  // Returns once `holds` does.
  template <class Condition>
  void sleep(Condition holds);
  void wake();

  std::atomic<int> threads_{1};  // of this run; atomic because a worker that leaves the last run may still read it
  int workers_ = 0;
  unsigned runs_ = 0;
  Call call_ = nullptr;
  const void* work_ = nullptr;
  std::unique_ptr<Member[]> members_;
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Team::run on a borrowed team. Throws std::invalid_argument unless 1 <= threads <= MOST_THREADS.
void run_on_team(int threads, Team::Call call, const void* work);

// Runs work(team, thread) on `threads` threads.
template <class Work>
void on_threads(int threads, const Work& work) {
  const auto call = [](const void* self, Team& team, int thread) { (*static_cast<const Work*>(self))(team, thread); };
  run_on_team(threads, call, &work);
}

// Thread `thread`'s share of 0 .. count - 1, cut at multiples of `unit`.
struct Share {
  std::int64_t start, stop;
};
inline Share share_of(std::int64_t count, int thread, int threads, std::int64_t unit = 1) {
  const std::int64_t units = (count + unit - 1) / unit;
  const auto cut = [&](int at) {
    const std::int64_t place = units * at / threads * unit;
    return place < count ? place : count;
  };
  return {cut(thread), cut(thread + 1)};
}

}  // namespace matquant
