// Eight numbers of a row, `stride` apart, to where they lie side by side.
template <typename T>
inline void copy_eight(const device T* source, int64_t stride, device T* target) {
  if (stride == 1 && wide_access(source)) {
    for (int unit = 0; unit < int(sizeof(T)) / 2; unit++) {
      ((device uint4*)target)[unit] = ((const device uint4*)source)[unit];
    }
  } else {
    for (int i = 0; i < 8; i++) {
      target[i] = source[i * stride];
    }
  }
}
