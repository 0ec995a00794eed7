// mlx-rs seeds its default random state from the clock of macOS through mach-sys; this is that clock elsewhere.
// Nanoseconds of a monotonic clock. In C++ rather than Rust so that shared libraries do not export the names.
#include <chrono>
#include <cstdint>

extern "C" uint64_t mach_absolute_time() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

extern "C" uint64_t mach_approximate_time() {
  return mach_absolute_time();
}
