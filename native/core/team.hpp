// Threads that share one piece of work: a team of the caller and workers that wait for the next one.
//
// Not OpenMP, whose threads cannot be had back after fork(), end the process where one cannot be started, and wait by
// spinning for as long as the process's environment says. A thread here waits by a short spin, which costs nothing to
// leave, and then asleep: its core is free for the thread that it waits for. Where spins turn out to be in vain (a
// busy process beside us, more threads than cores) a thread soon spins hardly at all; where they are not, again.
//
// A team is borrowed for one run() and kept for later ones, so as many exist as ever ran at once. Nothing is allocated
// but by the first run of a size. After fork() a child makes teams of its own.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace matquant {

constexpr int MOST_THREADS = 1024;  // of one run; src/matquant/threads.py allows a few per core

// Threads where the caller names none: OMP_NUM_THREADS if that is a number from 1 on, else the cores it may use.
int default_threads();

class Team {
 public:
  using Call = void (*)(const void* work, Team& team, int thread);

  Team();
  ~Team();
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // A barrier in two halves: this thread has come to its next one; and so have all.
  void arrive(int thread);
  void await(int thread);
  void barrier(int thread) {
    arrive(thread);
    await(thread);
  }

  // call(work, team, thread) for thread 0 (here) .. threads - 1; returns when all have. `call` must not throw.
  // std::runtime_error where a thread cannot be started; nothing has been called then.
  void run(int threads, Call call, const void* work);

 private:
  // What a thread writes and others wait for, in lines of its own.
  struct alignas(128) Member {
    std::atomic<unsigned> barriers{0};  // that it has come to in this run
    std::atomic<unsigned> run{0};       // the latest that it is to take part in
    // Its own: how long it spins at a barrier, and how often it has waited at one.
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

  std::atomic<int> threads_{1};  // of this run; a worker on its way out of the last one may still look
  int workers_ = 0;
  unsigned runs_ = 0;
  Call call_ = nullptr;
  const void* work_ = nullptr;
  std::unique_ptr<Member[]> members_;
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Team::run on a borrowed team; std::invalid_argument unless 1 <= threads <= MOST_THREADS.
void run_on_team(int threads, Team::Call call, const void* work);

// work(team, thread) on `threads` threads.
template <class Work>
void on_threads(int threads, const Work& work) {
  run_on_team(
      threads, [](const void* self, Team& team, int thread) { (*static_cast<const Work*>(self))(team, thread); }, &work);
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
