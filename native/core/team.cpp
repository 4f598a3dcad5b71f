#include "core/team.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace matquant {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::nanoseconds PATIENCE = std::chrono::microseconds(50);  // about twice the cost of sleeping
constexpr std::chrono::nanoseconds SHORTEST = PATIENCE / 256;  // after spins that did not pay
constexpr unsigned RETRY = 64;                                 // one wait in 64 uses the full patience again
constexpr int TURNS = 16;                                      // of the loop between two looks at the clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True if `holds` becomes true within TURNS looks.
template <class Condition>
bool look(const Condition& holds) {
  for (int turn = 0; turn < TURNS; ++turn, pause())
    if (holds()) return true;
  return false;
}

// True if `holds` becomes true before `patience` is over.
template <class Condition>
bool spin(std::chrono::nanoseconds patience, const Condition& holds) {
  for (const Clock::time_point start = Clock::now(); Clock::now() - start < patience;)
    if (look(holds)) return true;
  return false;
}

// Idle teams. Never destroyed: workers may be asleep in them when the process ends.
struct Pool {
  std::mutex mutex;
  std::vector<Team*> idle;
};

Pool* make_pool();

Pool& pool() {
  static Pool* const only = make_pool();
  return *only;
}

Pool* make_pool() {
  // A child of fork() has no workers: it forgets the teams and makes new ones when it needs them.
  pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                 [] {
                   pool().idle.clear();
                   pool().mutex.unlock();
                 });
  auto* made = new Pool;
  made->idle.reserve(64);
  return made;
}

// A team from the pool, returned at the end of the scope.
class Borrowed {
 public:
  Borrowed() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& idle = pool().idle;
    if (idle.empty()) {
      team_ = new Team;
    } else {
      team_ = idle.back();
      idle.pop_back();
    }
  }
  ~Borrowed() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().idle.push_back(team_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Team* operator->() const { return team_; }

 private:
  Team* team_;
};

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int default_threads() {
  const char* given = std::getenv("OMP_NUM_THREADS");
  const long wanted = given == nullptr ? 0 : std::strtol(given, nullptr, 10);
  const long threads = wanted > 0 ? wanted : cores();
  return static_cast<int>(threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads);
}

Team::Member::Member() : patience(PATIENCE) {}

Team::Team() = default;
Team::~Team() = default;

void Team::arrive(int thread) {
  if (threads() == 1) return;
  std::atomic<unsigned>& mine = members_[thread].barriers;
  const unsigned count = mine.load(std::memory_order_relaxed) + 1;
  mine.store(count);  // sequentially consistent, like sleepers_: a sleeper sees this or we see the sleeper
  if (sleepers_.load() > 0 && all_at(count)) wake();
}

void Team::await(int thread) {
  if (threads() == 1) return;
  const unsigned count = members_[thread].barriers.load(std::memory_order_relaxed);
  const auto here = [&] { return all_at(count); };
  if (look(here)) return;
  Member& self = members_[thread];
  const bool retry = ++self.waits % RETRY == 0;
  if (spin(retry ? PATIENCE : self.patience, here)) {
    self.patience = retry ? PATIENCE : std::min(self.patience * 2, PATIENCE);
  } else {
    self.patience = std::max(self.patience / 2, SHORTEST);
    sleep(here);
  }
}

void Team::run(int threads, Call call, const void* work) {
  threads_.store(threads, std::memory_order_relaxed);
  if (threads == 1) return call(work, *this, 0);
  if (members_ == nullptr) members_ = std::make_unique<Member[]>(MOST_THREADS);
  try {
    for (; workers_ < threads - 1; ++workers_) std::thread(&Team::serve, this, workers_ + 1).detach();
  } catch (const std::system_error&) {
    throw std::runtime_error("can't start new thread");  // the wording of Python
  }
  call_ = call;
  work_ = work;
  ++runs_;
  for (int thread = 0; thread < threads; ++thread) members_[thread].barriers.store(0, std::memory_order_relaxed);
  for (int thread = 1; thread < threads; ++thread) members_[thread].run.store(runs_);
  if (sleepers_.load() > 0) wake();
  call(work, *this, 0);
  barrier(0);
}

// The loop of a worker.
void Team::serve(int thread) {
  for (unsigned seen = 0;; arrive(thread)) {
    const std::atomic<unsigned>& run = members_[thread].run;
    const auto called = [&] { return run.load() != seen; };
    if (!spin(PATIENCE, called)) sleep(called);
    seen = run.load();
    call_(work_, *this, thread);
  }
}

bool Team::all_at(unsigned count) const {
  for (int thread = 0; thread < threads(); ++thread)
    if (members_[thread].barriers.load() < count) return false;
  return true;
}

template <class Condition>
void Team::sleep(Condition holds) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  changed_.wait(lock, holds);
  sleepers_.fetch_sub(1);
}

void Team::wake() {
  { const std::lock_guard<std::mutex> lock(mutex_); }  // every sleeper now sleeps, or has yet to check
  changed_.notify_all();
}

void run_on_team(int threads, Team::Call call, const void* work) {
  if (threads < 1 || threads > MOST_THREADS)
    throw std::invalid_argument("threads must be from 1 to " + std::to_string(MOST_THREADS));
  if (threads == 1) {
    Team alone;
    return alone.run(1, call, work);
  }
  Borrowed()->run(threads, call, work);
}

}  // namespace matquant
