import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// Vectors and scores, by the tiny random models of the fixtures.
    @Suite struct Encoders {
        private func encoder(_ name: String, in pool: EnginePool) async throws -> Model {
            try await pool.addModel(at: root.appendingPathComponent("tests/fixtures/encoders").appendingPathComponent(name))
        }

        @Test func textsBecomeVectors() async throws {
            try await withPool { pool, chat in
                let model = try await encoder("qwen3-embedding", in: pool)
                let texts = ["a river", "a stone", "a river"]
                let vectors = try await model.embed(texts).vectors
                #expect(vectors.count == 3 && vectors[0] == vectors[2] && vectors[0] != vectors[1])
                let length = vectors[1].reduce(0) { $0 + $1 * $1 }
                #expect(abs(length - 1) < 1e-3)
                let short = try await model.embed(texts, options: EmbeddingOptions(dimensions: 4, normalize: false))
                #expect(short.vectors.allSatisfy { $0.count == 4 })
                #expect(short.usage.promptTokens > 3 && short.truncated == 0)
                let error = try await failure(OMLXError.self) { _ = try await chat.embed(texts) }
                #expect(error.code == .unsupported)
                let long = String(repeating: "river ", count: 20_000)
                #expect(try await model.embed([long]).truncated == 1)
                let refused = try await failure(OMLXError.self) {
                    _ = try await model.embed([long], options: EmbeddingOptions(truncate: false))
                }
                #expect(refused.code == .contextLength)
            }
        }

        @Test func documentsGetScores() async throws {
            try await withPool { pool, chat in
                let model = try await encoder("bert-rerank", in: pool)
                let documents = ["a river", "a stone", "a tree"]
                let ranking = try await model.rerank(documents, for: "water", top: 2)
                #expect(ranking.scores.count == 3 && ranking.order.count == 2)
                let sorted = [0, 1, 2].sorted { ranking.scores[$0] > ranking.scores[$1] }
                #expect(ranking.order == Array(sorted.prefix(2)))
                let error = try await failure(OMLXError.self) { _ = try await chat.rerank(documents, for: "water") }
                #expect(error.code == .unsupported)
            }
        }

        @Test func theyAreCancelledWithTheTask() async throws {
            try await withPool { pool, _ in
                let model = try await encoder("qwen3-embedding", in: pool)
                let task = Task { try await model.embed(Array(repeating: "a river and a stone", count: 20_000)) }
                try await Task.sleep(for: .milliseconds(20))
                task.cancel()
                _ = try await failure(CancellationError.self) { _ = try await task.value }
                #expect(try await eventually { try pool.status().models["qwen3-embedding"]?.requests == 0 })
            }
        }
    }
}
