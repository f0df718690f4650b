#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace glm {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);  // longer than the pause between two operators of a step

thread_local bool inside_pool = false;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    int cores = (int)std::thread::hardware_concurrency();
    return cores > 0 ? cores : 1;
}

// Workers enter a job while it is open and leave it when no part is left. The caller closes the job when it finds no
// part left and then waits for those inside only: a worker that is asleep or slow to start delays nobody.
// Never destroyed: workers may outlive the destructors of the process.
class Pool {
public:
    explicit Pool(int size) : size_(size) {}

    int size() const { return size_.load(); }

    // Waits for a job that runs.
    void resize(int size) {
        std::lock_guard<std::mutex> owner(owner_);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_.store(false);
        size_.store(size);
    }

    // False: another thread has the pool.
    bool run(int64_t count, int64_t grain, Task task, const void* context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner) return false;
        start_workers();
        count_ = count, grain_ = grain, task_ = task, context_ = context;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        job_.fetch_add(1);
        if (sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        work();
        open_.store(false);
        for (int spins = 0; inside_.load() != 0; ++spins) spins < 4000 ? pause() : std::this_thread::yield();
        return true;
    }

private:
    void start_workers() {
        try {
            while ((int)workers_.size() < size_.load() - 1) workers_.emplace_back([this] { loop(); });
        } catch (const std::system_error&) {
            size_.store((int)workers_.size() + 1);  // the system gives no more threads
        }
    }

    void work() {
        inside_pool = true;
        for (;;) {
            int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (begin >= count_) break;
            task_(context_, begin, count_ - begin < grain_ ? count_ : begin + grain_);
        }
        inside_pool = false;
    }

    void loop() {
        uint64_t seen = job_.load() - 1;  // the job for which this worker was made
        while (!stop_.load()) {
            if (!wait(seen)) continue;
            seen = job_.load();
            inside_.fetch_add(1);
            if (open_.load()) work();
            inside_.fetch_sub(1);
        }
    }

    // True: there is a job after `seen`.
    bool wait(uint64_t seen) {
        auto limit = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (job_.load(std::memory_order_relaxed) != seen) return true;
                pause();
            }
        } while (std::chrono::steady_clock::now() < limit);
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return stop_.load() || job_.load() != seen; });
        sleeping_.fetch_sub(1);
        return job_.load() != seen;
    }

    std::atomic<int> size_;
    std::vector<std::thread> workers_;
    std::mutex owner_, sleep_;
    std::condition_variable wake_;
    std::atomic<bool> stop_{false}, open_{false};
    std::atomic<int> inside_{0}, sleeping_{0};
    std::atomic<uint64_t> job_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    int64_t count_ = 0, grain_ = 1;
    Task task_ = nullptr;
    const void* context_ = nullptr;
};

std::mutex pool_mutex;
std::atomic<Pool*> pool{nullptr};

// The threads of the parent do not exist in the child, and locks may be held by them: the child makes a new pool.
void after_fork() {
    new (&pool_mutex) std::mutex;
    pool.store(nullptr);
    inside_pool = false;
}

Pool& the_pool() {
    Pool* found = pool.load();
    if (found) return *found;
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (!pool.load()) {
        static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
        (void)registered;
        pool.store(new Pool(usable_cores()));
    }
    return *pool.load();
}

struct Blocks {
    void* block[SCRATCH_USES] = {};
    int64_t bytes[SCRATCH_USES] = {};
    ~Blocks() {
        for (void* memory : block) free(memory);
    }
};

}  // namespace

int threads() { return the_pool().size(); }

void set_threads(int count) {
    if (count <= 0) count = usable_cores();
    if (the_pool().size() != count) the_pool().resize(count);
}

void run_parallel(int64_t count, int64_t grain, Task task, const void* context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    if (count > grain && !inside_pool) {
        Pool& found = the_pool();
        if (found.size() > 1 && found.run(count, grain, task, context)) return;
    }
    task(context, 0, count);
}

void* scratch(Scratch use, int64_t bytes) {
    thread_local Blocks blocks;
    if (blocks.bytes[use] < bytes) {
        free(blocks.block[use]);
        blocks.block[use] = nullptr, blocks.bytes[use] = 0;
        int64_t page = bytes < (256 << 10) ? 4096 : 2 << 20;
        int64_t rounded = (bytes + page - 1) / page * page;
        void* memory = aligned_alloc(page, rounded);
        if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page > 4096) madvise(memory, rounded, MADV_HUGEPAGE);  // fewer misses of the table of pages
#endif
        blocks.block[use] = memory, blocks.bytes[use] = rounded;
    }
    return blocks.block[use];
}

}  // namespace glm
