import Foundation

/// Runs a C function that waits on a thread of its own, so that no thread of Swift's cooperative pool stands still.
///
/// A thread for each call, not a queue: such calls are few, take seconds, and may wait for each other (an unload for a load,
/// say), so that a limit on their number could bring them all to a halt.
func blocking<Value: Sendable>(_ body: @escaping @Sendable () throws -> Value) async throws -> Value {
    try await withCheckedThrowingContinuation { continuation in
        let thread = Thread { continuation.resume(with: Result(catching: body)) }
        thread.name = "omlx-blocking"
        // Secondary threads of macOS have 512 KiB, which is little for reading deep JSON.
        thread.stackSize = 4 << 20
        thread.start()
    }
}
