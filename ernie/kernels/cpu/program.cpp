// Recorded calls, made again with one team of threads that stays together from the first to the last.
#include "program.h"

#include "threads.h"

ParallelCall gomp_parallel = nullptr;
int (*num_threads_of_team)() = nullptr;

extern "C" void ernie_start(void *parallel, void *num_threads) {
    gomp_parallel = reinterpret_cast<ParallelCall>(parallel);
    num_threads_of_team = reinterpret_cast<int (*)()>(num_threads);
}

struct Entry {  // also in program.py
    void (*again)(const int64_t *words);
    const int64_t *words;
};

extern "C" void ernie_replay(const Entry *entries, long count, int threads) {
    if (threads <= 1) {
        for (long i = 0; i < count; i++) entries[i].again(entries[i].words);
        return;
    }
    struct Replay {
        const Entry *entries;
        long count;
        Team team;
    } replay{entries, count, {}};
    static thread_local bool leads = false;
    leads = true;
    gomp_parallel(
        [](void *argument) {
            Replay &replay = *static_cast<Replay *>(argument);
            if (!leads) return replay.team.follow();
            replay.team.others = num_threads_of_team() - 1;
            team = &replay.team;
            for (long i = 0; i < replay.count; i++) replay.entries[i].again(replay.entries[i].words);
            team = nullptr;
            replay.team.dismiss();
        },
        &replay, threads, 0);
    leads = false;
}
