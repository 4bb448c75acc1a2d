/* Threads of the OpenMP library that torch has loaded: two sets of threads would wait for each other.

   build.py passes the library's functions once the kernels are loaded. There are no OpenMP pragmas, because each compiler
   turns them into calls of its own library, and what Clang calls exists only in Clang's. All OpenMP libraries have the
   functions that GCC calls. If torch has none, the calling thread does everything. */
#pragma once

#include "tiles.h"

struct OpenMP {
    void (*parallel)(void (*function)(void *), void *argument, unsigned num_threads, unsigned flags);
    int (*num_threads)(void);
    int (*thread)(void);
    void (*barrier)(void);
};

static OpenMP openmp = {};

extern "C" void ovq_use_threads(void *parallel, void *num_threads, void *thread, void *barrier) {
    openmp = {(decltype(OpenMP::parallel))parallel, (decltype(OpenMP::num_threads))num_threads,
              (decltype(OpenMP::thread))thread, (decltype(OpenMP::barrier))barrier};
}

/* One of the threads that run a function together. */
struct Worker {
    int rank, num;

    /* Wait for the others; all of them must call it. */
    void wait() const {
        if (num > 1) openmp.barrier();
    }

    /* task(first, end) for this worker's part of `count`, which depends on its rank, `count` and the number of workers
       alone. */
    template <typename Task> void part(int64_t count, const Task &task) const {
        const int64_t each = count / num, rest = count % num;
        const int64_t first = rank * each + (rank < rest ? rank : rest);
        task(first, first + each + (rank < rest));
    }

    /* task(i) for every i in this worker's part of `count`. */
    template <typename Task> void share(int64_t count, const Task &task) const {
        part(count, [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; i++) task(i);
        });
    }

    /* Dynamic scheduling for tasks of unequal cost: a free worker takes the next. `next` is shared by all and 0 before. */
    template <typename Task> void take(int64_t count, int64_t *next, const Task &task) const {
        for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) task(i);
    }
};

/* Runs function(worker) on up to `num_threads` workers, returns when all are done, and releases their AMX tiles. */
template <typename Function> static void parallel(int64_t num_threads, const Function &function) {
    const auto run = [&](Worker worker) {
        function(worker);
        release_tiles();
    };
    if (num_threads <= 1 || !openmp.parallel) return run(Worker{0, 1});
    openmp.parallel([](void *each) { (*(decltype(run) *)each)(Worker{openmp.thread(), openmp.num_threads()}); },
                    (void *)&run, (unsigned)num_threads, 0);
}

/* Runs task(i) for all i below `count`, shared among up to `num_threads` threads. */
template <typename Task> static void parallel_for(int64_t num_threads, int64_t count, const Task &task) {
    parallel(num_threads, [&](Worker worker) { worker.share(count, task); });
}
