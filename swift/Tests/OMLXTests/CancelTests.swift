import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// Every way to end a generation before its time. Each one would go on for seconds.
    @Suite struct Cancelling {
        @Test func leavingTheLoop() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                let witness = Witness(generation)
                for try await event in generation {
                    if case .text = event { break }
                }
                try await witness.expectCancelled()
                // The generation itself was here all the time.
                withExtendedLifetime(generation) {}
            }
        }

        @Test func cancellingTheTask() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                let witness = Witness(generation)
                let (started, start) = AsyncStream.makeStream(of: Void.self)
                let task = Task {
                    for try await event in generation {
                        if case .text = event { start.yield() }
                    }
                }
                for await _ in started { break }
                task.cancel()
                await #expect(throws: CancellationError.self) { try await task.value }
                try await witness.expectCancelled()
            }
        }

        @Test func cancellingATaskThatWaits() async throws {
            // One sequence at a time: the second request gets no event before the first one ends.
            var options = PoolOptions()
            options.maximumSequences = 1
            try await withPool(options) { _, model in
                let first = try model.generate(endless())
                var events = first.makeAsyncIterator()
                _ = try await events.next()
                let second = try model.generate(endless())
                let witness = Witness(second)
                let task = Task { try await second.result() }
                try await Task.sleep(for: .milliseconds(50))
                let clock = ContinuousClock.now
                task.cancel()
                await #expect(throws: CancellationError.self) { try await task.value }
                #expect(ContinuousClock.now - clock < .seconds(2))
                try await witness.expectCancelled()
                first.cancel()
            }
        }

        @Test func aTaskThatIsCancelledAlready() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                let witness = Witness(generation)
                let task = Task {
                    while !Task.isCancelled { await Task.yield() }
                    return try await generation.result()
                }
                task.cancel()
                await #expect(throws: CancellationError.self) { try await task.value }
                try await witness.expectCancelled()
            }
        }

        @Test func forgettingIt() async throws {
            try await withPool { _, model in
                var generation: Generation? = try model.generate(endless())
                let witness = Witness(try #require(generation))
                generation = nil
                try await witness.expectCancelled()
            }
        }

        @Test func forgettingTheIterator() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                let witness = Witness(generation)
                var iterator: Generation.Iterator? = generation.makeAsyncIterator()
                _ = try await iterator?.next()
                iterator = nil
                try await witness.expectCancelled()
                withExtendedLifetime(generation) {}
            }
        }

        @Test func sayingSo() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                var result = GenerationResult()
                for try await event in generation {
                    if result.text.isEmpty { generation.cancel() }
                    result.add(event)
                }
                let completion = try #require(result.completion)
                #expect(completion.reason == .cancelled)
                #expect(completion.usage.completionTokens < 3500)
            }
        }

        @Test func unloadingTheModel() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless())
                let reader = Task { try await generation.result() }
                #expect(try await eventually { try model.pool.status().models["tiny-chat"]?.state == "loaded" })
                #expect(try await model.unload(cancellingRequests: true) > 0)
                let error = try await failure(OMLXError.self) { try await reader.value }
                #expect(error.code == .cancelled)
            }
        }

        @Test func closingThePool() async throws {
            try await withPool { pool, model in
                let generation = try model.generate(endless())
                let reader = Task { try await generation.result() }
                try await pool.close()
                let error = try await failure(OMLXError.self) { try await reader.value }
                #expect(error.code == .closed)
                #expect(throws: OMLXError.self) { try model.generate(endless()) }
            }
        }

        /// What the checks above see of a generation that nobody cancels.
        @Test func anUndisturbedOneIsNotCancelled() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless(5))
                let witness = Witness(generation)
                let dones = try await witness.dones()
                #expect(dones.map(\.reason) == [.length])
                #expect(dones.map(\.tokens) == [5])
                withExtendedLifetime(generation) {}
            }
        }
    }
}
