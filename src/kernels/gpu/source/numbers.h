// Rows of keys, values and queries are read in pieces of eight numbers. FORMAT: 0 is f32, 1 f16, 2 bf16.

// Eight numbers as they lie in memory; only f32 uses the second half.
struct Eight {
  uint4 low, high;
};

// Piece number `piece` of memory in which pieces lie side by side.
template <int FORMAT>
inline Eight load_eight(const device uint4* memory, size_t piece) {
  Eight x;
  if (FORMAT == 0) {
    x.low = memory[2 * piece];
    x.high = memory[2 * piece + 1];
  } else {
    x.low = memory[piece];
    x.high = x.low;
  }
  return x;
}

inline Eight eight_zeros() {
  Eight x;
  x.low.x = x.low.y = x.low.z = x.low.w = 0;
  x.high = x.low;
  return x;
}

template <int FORMAT>
inline void unpack_pair(uint bits, thread float& first, thread float& second) {
  if (FORMAT == 1) {
    float2 pair = halves(bits);
    first = pair.x;
    second = pair.y;
  } else {
    first = as_float(bits << 16);
    second = as_float(bits & 0xffff0000u);
  }
}

template <int FORMAT>
inline void unpack(Eight x, thread float (&out)[8]) {
  if (FORMAT == 0) {
    out[0] = as_float(x.low.x), out[1] = as_float(x.low.y), out[2] = as_float(x.low.z), out[3] = as_float(x.low.w);
    out[4] = as_float(x.high.x), out[5] = as_float(x.high.y), out[6] = as_float(x.high.z), out[7] = as_float(x.high.w);
  } else {
    unpack_pair<FORMAT>(x.low.x, out[0], out[1]);
    unpack_pair<FORMAT>(x.low.y, out[2], out[3]);
    unpack_pair<FORMAT>(x.low.z, out[4], out[5]);
    unpack_pair<FORMAT>(x.low.w, out[6], out[7]);
  }
}
