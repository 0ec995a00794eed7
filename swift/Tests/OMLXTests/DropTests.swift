import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// Generations that end at random points, by every way there is. `OMLX_DROPS` is how many.
    @Suite struct Dropping {
        /// How a generation is treated.
        enum Fate: CaseIterable {
            case never, read, leave, forget, say, cancelTask
        }

        @Test func everyGenerationEndsOnce() async throws {
            let all = count("OMLX_DROPS", default: 400)
            let seed = UInt64(count("OMLX_SEED", default: 7))
            var options = PoolOptions()
            options.cacheBytes = 16 << 20
            try await withPool(options) { _, model in
                // What the process keeps after the first ones, it keeps once.
                try await Self.run(max(all / 10, 50), seed: seed &+ 1, on: model)
                let before = Self.residentBytes()
                let fates = try await Self.run(all, seed: seed, on: model)
                let growth = Self.residentBytes() - before
                let counts = Fate.allCases.map { "\($0) \(fates[$0] ?? 0)" }.joined(separator: ", ")
                print("\(all) generations: \(counts); \(growth >> 10) KiB more than before")
                #expect(fates.values.reduce(0, +) == all)
                #expect(Set(fates.keys) == Set(Fate.allCases))
                #expect(growth < 8 << 20)
                // The pool and its model are here, and nothing of the generations.
                #expect(await eventually { handles() == [1, 0, 0, 0] }, "left behind: \(handles())")
                let idle = try await eventually { try model.pool.status().models["tiny-chat"]?.requests == 0 }
                #expect(idle)
            }
        }

        /// Eight at a time; returns how many had which fate.
        @discardableResult
        static func run(_ all: Int, seed: UInt64, on model: Model) async throws -> [Fate: Int] {
            try await withThrowingTaskGroup(of: Fate.self) { group in
                var fates: [Fate: Int] = [:]
                for number in 0..<all {
                    if number >= 8, let fate = try await group.next() { fates[fate, default: 0] += 1 }
                    group.addTask {
                        var random = SplitMix(state: seed &+ UInt64(number) &* 7919)
                        return try await one(&random, on: model)
                    }
                }
                for try await fate in group { fates[fate, default: 0] += 1 }
                return fates
            }
        }

        /// Starts a generation, ends it at a random point, and checks that it has one done event, wherever it was read.
        static func one(_ random: inout SplitMix, on model: Model) async throws -> Fate {
            let fate = Fate.allCases.randomElement(using: &random) ?? .never
            let length = Int.random(in: 1...24, using: &random)
            let point = Int.random(in: 0...length, using: &random)
            let pause = Duration.microseconds(Int.random(in: 0...4000, using: &random))
            let ends = Locked(0)
            let witness: Witness
            do {
                let generation = try model.generate(endless(length))
                witness = Witness(generation)
                try await treat(generation, fate: fate, point: point, pause: pause) { event in
                    if case .finished = event { ends.withLock { $0 += 1 } }
                }
            }
            let dones = try await witness.dones().count + ends.withLock { $0 }
            #expect(dones == 1, "\(fate) at \(point) of \(length)")
            return fate
        }

        private static func treat(
            _ generation: Generation, fate: Fate, point: Int, pause: Duration,
            _ see: @escaping @Sendable (GenerationEvent) -> Void
        ) async throws {
            switch fate {
            case .never: break
            case .forget:
                var iterator = generation.makeAsyncIterator()
                for _ in 0..<point / 2 { try await iterator.next().map(see) }
            case .read:
                for try await event in generation { see(event) }
            case .leave, .say:
                var seen = 0
                for try await event in generation {
                    see(event)
                    seen += 1
                    if fate == .leave, seen > point { break }
                    if fate == .say, seen == point { generation.cancel() }
                }
            case .cancelTask:
                let task = Task { for try await event in generation { see(event) } }
                try await Task.sleep(for: pause)
                task.cancel()
                // It may have come to its end before.
                do { try await task.value } catch is CancellationError {}
            }
        }

        /// Memory of this process.
        static func residentBytes() -> Int {
            let fields = (try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8))?.split(separator: " ") ?? []
            return fields.count > 1 ? (Int(fields[1]) ?? 0) * 4096 : 0
        }
    }
}

/// Random numbers that a seed repeats.
struct SplitMix: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94d0_49bb_1331_11eb
        return mixed ^ (mixed >> 31)
    }
}
