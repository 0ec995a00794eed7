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
            // Nothing but the cancel can wake the task: the engine stands still.
            try await withPool { _, model in
                let engine = try await HeldEngine(model)
                defer { engine.goOn() }
                let generation = try model.generate(endless())
                let witness = Witness(generation)
                let hasEnded = Locked(false)
                let task = Task {
                    defer { hasEnded.withLock { $0 = true } }
                    return try await generation.result()
                }
                #expect(await eventually { generation.request.wake.isWaiting })
                // The thread that takes requests in comes to this one later, and refuses it: it could not end the first one, either.
                let long = ChatRequest(messages: [.user(String(repeating: "fox and hound ", count: 3000))])
                try await expect(.contextLength) { try await model.generate(long).result() }
                #expect(!hasEnded.withLock { $0 })
                task.cancel()
                #expect(await eventually { hasEnded.withLock { $0 } })
                #expect(!witness.hasEvent())
                engine.goOn()
                await #expect(throws: CancellationError.self) { try await task.value }
                try await witness.expectCancelled()
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
