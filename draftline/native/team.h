// Threads that share the work of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <omp.h>
#include <sched.h>

namespace draftline {

// The threads of one call, who take pieces of work from a common counter. Work and barriers are of microseconds, so
// they wait by spinning; after a while they yield, or a machine with other work would lose a time slice at each wait.
class Team {
  public:
    explicit Team(int64_t threads) : threads_(threads) {}

    // Runs work(0) ... work(count - 1), each once, and waits for all; every thread of the team calls it.
    template <class Work>
    void share(int64_t count, const Work& work) {
        const int64_t piece = std::max<int64_t>(1, count / (8 * threads_));
        for (int64_t first; (first = next_.fetch_add(piece, std::memory_order_relaxed)) < count;)
            for (int64_t i = first; i < std::min(first + piece, count); i++) work(i);
        wait();
    }

  private:
    static constexpr int SPINS = 20000;

    void wait() {
        const int64_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            if (spins > SPINS) sched_yield();
    }

    const int64_t threads_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> round_{0};
};

// Calls work(team) on every thread of a team.
template <class Work>
void run(int64_t num_threads, const Work& work) {
    // A runtime may give fewer threads than asked for, so the team is made by whoever comes.
    Team* team = nullptr;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        team = new Team(omp_get_num_threads());
        work(*team);
    }
    delete team;
}

}  // namespace draftline
