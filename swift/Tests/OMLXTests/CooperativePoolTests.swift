import Foundation
import Testing

@testable import OMLX

/// Whether a new task is run to its end within `seconds`. Waits on the calling thread, which must be none of the cooperative pool.
private func tasksRun(within seconds: Double) -> Bool {
    let done = DispatchSemaphore(value: 0)
    Task.detached(priority: .medium) {
        for _ in 0..<100 { await Task.yield() }
        done.signal()
    }
    return done.wait(timeout: .now() + seconds) == .success
}

/// More than the pool has threads.
private let many = 4 * max(ProcessInfo.processInfo.activeProcessorCount, 2)

extension LibraryTests {
    /// Calls that wait leave the threads of the cooperative pool to other tasks.
    @Suite struct CooperativePool {
        @Test func nothingThatWaitsHoldsAThread() async throws {
            var options = PoolOptions()
            options.queueLength = 2 * many
            try await withPool(options) { _, model in
                let engine = try await HeldEngine(model)
                defer { engine.goOn() }
                let generations = try (0..<many).map { _ in try model.generate(endless(1)) }
                // If tasks could not run, neither could this one: a thread of its own asks them, and lets the engine go on.
                let (run, readers, unloads) = try await blocking {
                    let readers = generations.map { generation in
                        Task.detached(priority: .medium) { try await generation.result() }
                    }
                    let unloads = (0..<many).map { _ in Task.detached(priority: .medium) { try await model.unload() } }
                    defer { engine.goOn() }
                    let run = tasksRun(within: 20)
                    // All of them wait meanwhile.
                    var all = false
                    for _ in 0..<1000 where !all {
                        all = generations.allSatisfy { $0.request.wake.isWaiting }
                        if !all { Thread.sleep(forTimeInterval: 0.01) }
                    }
                    return (run && all, readers, unloads)
                }
                #expect(run)
                for reader in readers { #expect(try await reader.value.completion?.reason == .length) }
                for unload in unloads { _ = try await unload.value }
            }
        }

        /// What the check above sees where threads are held.
        @Test func aTaskThatBlocksIsSeen() async throws {
            let run = try await blocking {
                let gate = DispatchSemaphore(value: 0)
                for _ in 0..<many {
                    Task.detached(priority: .medium) { Self.wait(for: gate) }
                }
                defer { for _ in 0..<many { gate.signal() } }
                return tasksRun(within: 2)
            }
            #expect(!run)
        }

        private static func wait(for gate: DispatchSemaphore) {
            gate.wait()
        }
    }
}
