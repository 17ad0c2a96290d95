// Memory of tensors for training: large blocks are kept when they are freed, and given out again.
//
// A fresh page costs the processor a fault and its zeroing, and a step of training asks for a
// multiple of what it holds: where every tensor is mapped anew, faults are a third of the step.
// Blocks below SMALL are left to torch's own allocator. The others have a mapping each, so that
// what comes next never finds a hole too small for it, and wait in a list when they are freed. In
// use and waiting together stay below the most that was ever in use at once: the oldest that wait
// make room. So the process holds no more than its tensors needed at one time anyway.
//
// Needs torch's headers, unlike the other sources, for the interface `c10::Allocator`.

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t SMALL = 128 << 10;
constexpr size_t HUGE = 2 << 20;  // a huge page
constexpr size_t STEPS = 16;      // sizes between two powers of two

struct Block {
  void* start;  // of its mapping
  size_t size;  // of its mapping
};

size_t up_to(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// What is mapped for n bytes: little more, so that tensors of about one size share blocks. Pages
// that nobody writes to take no memory.
size_t mapped_size(size_t n) {
  size_t unit = PAGE;
  while (unit * 2 * STEPS <= n) unit *= 2;
  return up_to(n, unit);
}

class Keeper final : public c10::Allocator {
 public:
  explicit Keeper(c10::Allocator* small) : small_(small) {}

  c10::DataPtr allocate(size_t n) override {
    void* start = n < SMALL ? small_->raw_allocate(n) : take(n);
    return {start, start, raw_deleter(), c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Keeper::give_back; }

  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }

  void told(long out[3]) {
    std::lock_guard<std::mutex> lock(mutex_);
    out[0] = used_;
    out[1] = kept_;
    out[2] = most_used_;
  }

  static Keeper& own() {
    static Keeper* keeper = new Keeper(c10::GetCPUAllocator());  // outlives every tensor
    return *keeper;
  }

 private:
  using Waiting = std::list<Block>;  // oldest first

  static void give_back(void* start) {
    Keeper& keeper = own();
    // Only blocks begin where a page does, or nearly only.
    if (reinterpret_cast<uintptr_t>(start) % PAGE || !keeper.keep(start))
      keeper.small_->raw_deallocate(start);
  }

  // False if it is none of these blocks.
  bool keep(void* start) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = in_use_.find(start);
    if (found == in_use_.end()) return false;
    Block block{start, found->second};
    in_use_.erase(found);
    used_ -= block.size;
    kept_ += block.size;
    waiting_.push_back(block);
    by_size_.emplace(block.size, std::prev(waiting_.end()));
    return true;
  }

  void* take(size_t n) {
    size_t size = mapped_size(n);
    std::lock_guard<std::mutex> lock(mutex_);
    Block block = kept_block(size);
    if (block.start == nullptr) {
      while (!waiting_.empty() && used_ + kept_ + size > most_used_) unmap_oldest();
      block = {mapped(size), size};
    }
    in_use_.emplace(block.start, block.size);
    used_ += block.size;
    most_used_ = std::max(most_used_, used_);
    return block.start;
  }

  // The smallest block that waits and is not much too large; the newest of equals, which may still
  // lie in a cache of the processor. None: no start.
  Block kept_block(size_t size) {
    auto found = by_size_.lower_bound(size);
    if (found == by_size_.end() || found->first > size + size / 8) return {nullptr, 0};
    found = std::prev(by_size_.upper_bound(found->first));
    Block block = *found->second;
    waiting_.erase(found->second);
    by_size_.erase(found);
    kept_ -= block.size;
    return block;
  }

  static void* mapped(size_t size) {
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, start != MAP_FAILED, "not enough memory for a tensor of ",
                     size, " bytes");
#ifdef MADV_HUGEPAGE
    if (size >= HUGE) madvise(start, size, MADV_HUGEPAGE);
#endif
    return start;
  }

  void unmap_oldest() {
    Block block = waiting_.front();
    auto it = by_size_.lower_bound(block.size);  // in the order of their coming
    by_size_.erase(it);
    waiting_.pop_front();
    kept_ -= block.size;
    munmap(block.start, block.size);
  }

  c10::Allocator* small_;
  std::mutex mutex_;
  Waiting waiting_;
  std::unordered_map<void*, size_t> in_use_;
  std::multimap<size_t, Waiting::iterator> by_size_;
  size_t used_ = 0, kept_ = 0, most_used_ = 0;
};

}  // namespace

extern "C" {
void ernie_keep_memory() { c10::SetCPUAllocator(&Keeper::own()); }
void ernie_memory(long out[3]) { Keeper::own().told(out); }
}
