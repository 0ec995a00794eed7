// What cuda.h defines beyond the names of the language.
inline float as_float(uint bits) { return as_type<float>(bits); }
inline float2 halves(uint bits) { return float2(as_type<half2>(bits)); }
inline float power_of_two(float x) { return metal::fast::exp2(x); }
inline float natural_log(float x) { return metal::precise::log(x); }
inline float inverse_root(float x) { return metal::precise::rsqrt(x); }
inline float cosine(float x) { return metal::precise::cos(x); }
inline float sine(float x) { return metal::precise::sin(x); }
inline float smaller(float a, float b) { return metal::min(a, b); }
inline float larger(float a, float b) { return metal::max(a, b); }
inline int larger(int a, int b) { return metal::max(a, b); }
inline int smaller(int a, int b) { return metal::min(a, b); }
inline float from_lane_xor(float x, int mask) { return simd_shuffle_xor(x, ushort(mask)); }
inline void wait_for_threadgroup() { threadgroup_barrier(mem_flags::mem_threadgroup); }
// The language has no portable way to look at an address: numbers are read one by one.
inline bool wide_access(const device void*) { return false; }
inline int same_in_simd(int x) { return simd_broadcast_first(x); }
inline void wait_for_memory() { threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); }
// Threadgroups of one kernel cannot rely on each other's writes: LAST_COMBINES is 0, and these are not called.
inline void publish() {}
inline uint take_ticket(device uint*) { return 0; }
inline float4 published(const device float4* at) { return *at; }
inline float published(const device float* at) { return *at; }
