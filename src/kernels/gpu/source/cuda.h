// The names of the Metal Shading Language that the kernels use, in CUDA.
#define thread
#define device
#define threadgroup __shared__
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup threadIdx.x
typedef unsigned int uint;

inline float as_float(uint bits) { return __uint_as_float(bits); }

// Two neighbouring f16 numbers.
inline float2 halves(uint bits) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }

// 2^x; what would be subnormal is zero.
inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline float natural_log(float x) { return logf(x); }
inline float inverse_root(float x) { return rsqrtf(x); }
inline float cosine(float x) { return cosf(x); }
inline float sine(float x) { return sinf(x); }

inline float larger(float a, float b) { return fmaxf(a, b); }
inline float smaller(float a, float b) { return fminf(a, b); }
inline int larger(int a, int b) { return a > b ? a : b; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of a SIMD group take part.
inline float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Waits for the whole threadgroup; its shared memory is then visible to all of it.
inline void wait_for_threadgroup() { __syncthreads(); }

// Whether 16 bytes can be read here at once.
inline bool wide_access(const void* at) { return (reinterpret_cast<size_t>(at) & 15) == 0; }

// A value that is the same in all lanes of a SIMD group, told to the compiler.
inline int same_in_simd(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Waits for the whole threadgroup; what it wrote to memory is then visible to all of it.
inline void wait_for_memory() { __syncthreads(); }

// The last threadgroup of those that share a counter sees what the others wrote before they took their tickets.
inline void publish() { __threadfence(); }
inline uint take_ticket(uint* counter) { return atomicAdd(counter, 1u); }
inline float4 published(const float4* at) { return __ldcg(at); }
inline float published(const float* at) { return __ldcg(at); }
