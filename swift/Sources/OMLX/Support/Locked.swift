import Foundation

/// A value behind a lock, for state that threads of the library and tasks share. The lock is held for a few instructions,
/// never while something is awaited. (`Mutex` of the standard library needs macOS 15.)
final class Locked<Value: Sendable>: @unchecked Sendable {
    // Unchecked: `value` is touched under `lock` only.
    private let lock = NSLock()
    private var value: Value

    init(_ value: Value) {
        self.value = value
    }

    func withLock<Result>(_ body: (inout Value) throws -> Result) rethrows -> Result {
        lock.lock()
        defer { lock.unlock() }
        return try body(&value)
    }
}
