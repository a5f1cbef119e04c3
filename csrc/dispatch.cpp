// Picks one kernel table, best first. No table needs code of its level to be reached or chosen.
#include <atomic>
#include <cstring>

#include "cpu_features.hpp"
#include "kernel_table.hpp"

namespace fastnorm {

extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_baseline;

namespace {

const KernelTable* const kTables[] = {
#ifdef FASTNORM_HAS_ISA_avx512
    &kernels_avx512,
#endif
#ifdef FASTNORM_HAS_ISA_avx2
    &kernels_avx2,
#endif
    &kernels_baseline,
};
constexpr int kTableCount = sizeof(kTables) / sizeof(kTables[0]);

const KernelTable* best() {
  for (const KernelTable* table : kTables) {
    if (cpu_supports(table->level)) return table;
  }
  return &kernels_baseline;
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = best();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

bool select(const char* level) {
  for (const KernelTable* table : kTables) {
    if (std::strcmp(table->level, level) == 0 && cpu_supports(level)) {
      current.store(table, std::memory_order_release);
      return true;
    }
  }
  return false;
}

const char* compiled_level(int index) { return index < kTableCount ? kTables[index]->level : nullptr; }

}  // namespace fastnorm
