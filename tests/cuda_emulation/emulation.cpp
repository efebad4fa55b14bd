#include "emulation.h"

#include <ucontext.h>

#include <csetjmp>
#include <memory>
#include <stdexcept>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMostShared = 48 * 1024;  // what every GPU gives without asking

// Released when as many threads have arrived as it needs.
struct Barrier {
  int needed = 0, arrived = 0;
  uint64_t generation = 0;

  bool release_if_full() {
    if (arrived == 0 || arrived < needed) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t values[2]
                 [kWarpSize];  // by parity of the generation: the next shuffle may begin before all have read
};

struct Fibre {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t start;
  jmp_buf context;
  bool finished = true;
};

struct Machine {
  std::vector<std::unique_ptr<Fibre>> fibres;  // kept from block to block
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Barrier block;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  int current = 0, threads = 0;
  bool rising = true, progress = false;
} machine;

// Back to the scheduler; returns when this fibre's turn comes again. Switching by _setjmp and _longjmp saves
// the system call that swapcontext makes.
void yield() {
  if (_setjmp(machine.fibres[machine.current]->context) == 0) _longjmp(machine.scheduler, 1);
}

void wait_at(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  if (barrier.release_if_full()) machine.progress = true;
  while (barrier.generation == generation) yield();
}

// A fibre runs one thread of each block, for ever.
void fibre_main() {
  for (;;) {
    (*machine.kernel)();
    machine.fibres[machine.current]->finished = true;
    machine.progress = true;
    --machine.block.needed;  // __syncthreads waits for the threads that are left
    machine.block.release_if_full();
    yield();
  }
}

void start(Fibre& fibre) {
  fibre.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.get();
  fibre.start.uc_stack.ss_size = kStackBytes;
  fibre.start.uc_link = nullptr;
  makecontext(&fibre.start, fibre_main, 0);
  setcontext(&fibre.start);
}

void resume(int thread) {
  machine.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x, 0};
  Fibre& fibre = *machine.fibres[thread];
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre.stack == nullptr) start(fibre);
  _longjmp(fibre.context, 1);
}

void prepare_block(int threads, size_t shared_bytes) {
  machine.threads = threads;
  machine.block = {threads, 0, 0};
  machine.warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  for (Warp& warp : machine.warps) warp.barrier.needed = kWarpSize;
  machine.shared.assign(shared_bytes, 0xff);
  while (int(machine.fibres.size()) < threads) machine.fibres.push_back(std::make_unique<Fibre>());
  for (int t = 0; t < threads; ++t) machine.fibres[t]->finished = false;
}

void run_block() {
  for (int left = machine.threads; left > 0;) {
    machine.progress = false;
    left = 0;
    for (int turn = 0; turn < machine.threads; ++turn) {
      const int thread = machine.rising ? turn : machine.threads - 1 - turn;
      if (machine.fibres[thread]->finished) continue;
      resume(thread);
      left += !machine.fibres[thread]->finished;
    }
    if (left > 0 && !machine.progress) {
      machine.fibres.clear();  // their stacks hold threads that never ended
      throw std::runtime_error("emulation: threads wait at a barrier or shuffle that others never reach");
    }
  }
}

}  // namespace

void set_order(bool rising) { machine.rising = rising; }

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x * block.y);
  if (threads == 0 || threads > 1024 || block.z != 1 || grid.x == 0 || grid.y != 1 || grid.z != 1)
    throw std::runtime_error("emulation: no GPU launches such a grid");
  if (shared_bytes > kMostShared) throw std::runtime_error("emulation: more than 48 KiB of shared memory");
  machine.kernel = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = {b, 0, 0};
    prepare_block(threads, shared_bytes);
    run_block();
  }
}

unsigned char* dynamic_shared() { return machine.shared.data(); }
int lane() { return machine.current % kWarpSize; }
void wait_for_block() { wait_at(machine.block); }

uint64_t exchange(uint64_t bits, int from) {
  Warp& warp = machine.warps[machine.current / kWarpSize];
  uint64_t* const values = warp.values[warp.barrier.generation % 2];
  values[lane()] = bits;
  wait_at(warp.barrier);
  return values[from];
}

}  // namespace emulation
