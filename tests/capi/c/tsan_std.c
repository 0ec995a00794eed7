/* What tells ThreadSanitizer of the locks of Rust's standard library, which is not instrumented: linked into the instrumented libomlx,
 * with the linker's --wrap for each function here. The fast paths of locks are inlined into instrumented code; these are the slow
 * ones. The macros are the functions' symbols, which tests/capi/tsan looks up. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

/* `wrap_NAME` takes the place of the function `symbol`, and `real_NAME` is that function. */
#define WRAP(result, name, symbol, ...) \
    result wrap_##name(__VA_ARGS__) __asm__("__wrap_" symbol); \
    result real_##name(__VA_ARGS__) __asm__("__real_" symbol);

WRAP(void, lock, MUTEX_LOCK_CONTENDED, void *)
WRAP(void, read, RWLOCK_READ_CONTENDED, void *)
WRAP(void, write, RWLOCK_WRITE_CONTENDED, void *)
WRAP(void, wait, CONDVAR_WAIT, void *, void *)
WRAP(bool, wait_timeout, CONDVAR_WAIT_TIMEOUT, void *, void *, uint64_t, uint32_t)

void wrap_lock(void *mutex) {
    real_lock(mutex);
    __tsan_acquire(mutex);
}

void wrap_read(void *lock) {
    real_read(lock);
    __tsan_acquire(lock);
}

void wrap_write(void *lock) {
    real_write(lock);
    __tsan_acquire(lock);
}

void wrap_wait(void *condvar, void *mutex) {
    __tsan_release(mutex);
    real_wait(condvar, mutex);
    __tsan_acquire(mutex);
}

bool wrap_wait_timeout(void *condvar, void *mutex, uint64_t seconds, uint32_t nanoseconds) {
    bool woken;
    __tsan_release(mutex);
    woken = real_wait_timeout(condvar, mutex, seconds, nanoseconds);
    __tsan_acquire(mutex);
    return woken;
}

/* `Once::call` says that it is done in code that is not instrumented. So the closure that it calls says it, as its last act. */
typedef struct vtable {
    void *drop;
    size_t size, align;
    void (*call_once)(void *data, void *state);
    void (*call_mut)(void *data, void *state);
} vtable;

typedef struct closure {
    void *data;
    const vtable *table;
    void *once;
} closure;

static void call_and_release(void *data, void *state) {
    closure *c = data;
    c->table->call_mut(c->data, state);
    __tsan_release(c->once);
}

static const vtable releasing = {NULL, sizeof(closure), _Alignof(closure), call_and_release, call_and_release};

WRAP(void, once, ONCE_CALL, void *, bool, void *, const vtable *, void *)
void wrap_once(void *once, bool poisoned, void *data, const vtable *table, void *location) {
    closure c = {data, table, once};
    real_once(once, poisoned, &c, &releasing, location);
    __tsan_acquire(once);
}

/* The last owner of an Arc has a fence before it drops the value, and ThreadSanitizer knows no fences. As strong an order of the
 * subtraction itself says the same. */
WRAP(uint64_t, subtract, "__tsan_atomic64_fetch_sub", void *, uint64_t, int)
uint64_t wrap_subtract(void *count, uint64_t value, int order) {
    (void)order;
    return real_subtract(count, value, __ATOMIC_ACQ_REL);
}
