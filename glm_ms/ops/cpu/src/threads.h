// One pool of threads for all kernels of the process.
#pragma once

#include <cstdint>

namespace glm {

// Number of threads that share the work, the caller included.
int threads();

// Sets the number of threads; 0: the cores that the process may use. Do not call it inside parallel_for.
void set_threads(int count);

using Task = void (*)(const void* context, int64_t begin, int64_t end);
void run_parallel(int64_t count, int64_t grain, Task task, const void* context);

// Calls f(begin, end) for parts of [0, count), of `grain` items each (the last may be smaller), from several threads.
// A part may also be larger: when the pool is busy with another caller, inside another parallel_for, and with one
// thread, f(0, count) runs in the caller. So a result may depend neither on the parts nor on the thread.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
    run_parallel(
        count, grain,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

// Memory of the calling thread, aligned to 64 bytes, one block for each use; its content is lost at the next call for
// the same use. A caller of parallel_for may share its block with the workers: they have blocks of their own.
enum Scratch {
    ACTIVATIONS, BLOCK, PARTIALS, WEIGHTS, OPERATOR, ROWS, ATTENTION, SCORES, PIECES, MIXTURES, ADAPTER, GRADIENT,
    SCRATCH_USES
};
void* scratch(Scratch use, int64_t bytes);

template <class T>
T* scratch_of(Scratch use, int64_t count) {
    return static_cast<T*>(scratch(use, count * (int64_t)sizeof(T)));
}

}  // namespace glm
