import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// How long it takes until a generation is told of.
    @Suite struct Latency {
        /// From `generate` to the first event, without a model's work in between: the prompt is longer than the context, so the
        /// thread of the library that takes requests in refuses it, and the event comes back through wake, task and iterator.
        @Test(arguments: [#""prompt":[5,5,5,5,5,5,5,5,5,5]"#, #""messages":[{"role":"user","content":"Tell me a story."}]"#])
        func theFirstEventComesAtOnce(prompt: String) async throws {
            var options = PoolOptions()
            options.contextLength = 8
            try await withPool(options) { pool, model in
                try await model.load()
                let times = try await Self.times(500) {
                    var events = try pool.generate(json: #"{"model":"tiny-chat",\#(prompt)}"#).makeAsyncIterator()
                    do {
                        _ = try await events.next()
                        Issue.record("the prompt should be too long")
                    } catch let error as OMLXError {
                        #expect(error.code == .contextLength)
                    }
                }
                print("refused: \(prompt): best \(times[0]), median \(times[times.count / 2])")
                // What else the machine does can only add to the best.
                #expect(times[0] < .microseconds(500))
            }
        }

        /// From `generate` to the first token, by the model that computes nothing: the whole way through the engine.
        @Test func theFirstTokenOfAModelThatCostsNothingComesAtOnce() async throws {
            let folder = root.appendingPathComponent("tests/fixtures/null/omlx-null")
            try await withPool(PoolOptions(modelsFolder: folder)) { pool, _ in
                let json = #"{"prompt":[1,316,207,1910],"max_tokens":1,"ignore_eos":true}"#
                var medians: [Duration] = []
                for _ in 0..<5 {
                    let times = try await Self.times(200) {
                        var events = try pool.generate(json: json).makeAsyncIterator()
                        guard case .text(let piece) = try await events.next() else {
                            Issue.record("no text")
                            return
                        }
                        #expect(piece.text == "word" && piece.tokens.count == 1)
                    }
                    medians.append(times[times.count / 2])
                }
                // What else the machine does can only add to the best.
                let best = try #require(medians.min())
                print("first token without a model's work: best median \(best)")
                #expect(best < .microseconds(500))
            }
        }

        /// An answer of one token of the bundled model: for the record, without a bar.
        @Test func theFirstTokenComes() async throws {
            try await withPool { _, model in
                try await model.load()
                let times = try await Self.times(50) {
                    var events = try model.generate(endless(1)).makeAsyncIterator()
                    #expect(try await events.next() != nil)
                }
                print("one token: best \(times[0]), median \(times[times.count / 2])")
            }
        }

        static func times(_ count: Int, _ body: () async throws -> Void) async throws -> [Duration] {
            var times: [Duration] = []
            for _ in 0..<count {
                let start = ContinuousClock.now
                try await body()
                times.append(ContinuousClock.now - start)
            }
            return times.sorted()
        }
    }
}
