import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// Events as they come.
    @Suite struct Streaming {
        /// What the reference implementation answers, from the fixtures.
        struct Fixture: Decodable {
            struct Case: Decodable {
                let name: String
                let text: String
            }
            let cases: [Case]
        }

        @Test func textIsTheReferences() async throws {
            let json = try Data(contentsOf: root.appendingPathComponent("tests/fixtures/tiny-chat.json"))
            let story = try #require(JSONDecoder().decode(Fixture.self, from: json).cases.first { $0.name == "story" })
            var options = PoolOptions()
            (options.precision, options.dtype) = (.exact, .float32)
            try await withPool(options) { _, model in
                let messages = [ChatMessage.user("Tell me a short story about a fox.")]
                let request = ChatRequest(messages: messages, options: GenerationOptions(temperature: 0))
                var pieces: [String] = []
                var ends: [Completion] = []
                for try await event in try model.generate(request) {
                    #expect(ends.isEmpty, "\(event) came after the end")
                    switch event {
                    case .text(let piece): pieces.append(piece.text)
                    case .finished(let completion): ends.append(completion)
                    default: Issue.record("unexpected: \(event)")
                    }
                }
                #expect(pieces.joined().hasPrefix(story.text))
                #expect(pieces.count > 5, "it came in \(pieces.count) pieces")
                #expect(ends.map(\.reason) == [.stop])
                let usage = try #require(ends.first).usage
                #expect(usage.promptTokens == 17)
                #expect(usage.completionTokens > 30)
                #expect(usage.secondsToFirstToken > 0 && usage.tokensPerSecond > 0)
            }
        }

        @Test func thinkingIsToldApart() async throws {
            try await withPool { _, model in
                let request = ChatRequest(
                    messages: [.user("What is 12 plus 30?")],
                    options: GenerationOptions(temperature: 0, enableThinking: true))
                let result = try await model.generate(request).result()
                #expect(!result.reasoning.isEmpty && !result.text.isEmpty)
                #expect(!result.text.contains("<think>"))
                #expect(try #require(result.completion).usage.reasoningTokens > 0)
            }
        }

        @Test func whatWasAskedForIsReported() async throws {
            try await withPool { _, model in
                let request = ChatRequest(
                    messages: [.user("Tell me a short story about a fox.")],
                    options: GenerationOptions(maximumResponseTokens: 4),
                    others: ["n": 2, "logprobs": true, "top_logprobs": 3])
                var loading: [LoadingProgress] = []
                var ends: Set<Int> = []
                var tokens: [Int: Int] = [:]
                for try await event in try model.generate(request, options: RequestOptions(reportsLoading: true)) {
                    switch event {
                    case .loading(let progress): loading.append(progress)
                    case .text(let piece):
                        tokens[piece.choice, default: 0] += piece.tokens.count
                        #expect(piece.logprobs.map(\.token) == piece.tokens)
                        #expect(piece.logprobs.allSatisfy { $0.top.count == 3 && $0.logprob <= 0 })
                    case .choiceFinished(let choice, let reason, let stopString):
                        #expect(reason == .length && stopString == nil)
                        ends.insert(choice)
                    case .started: Issue.record("nobody asked for the start")
                    case .finished, .reasoning, .toolCall: break
                    }
                }
                #expect(!loading.isEmpty)
                #expect(ends == [0, 1])
                #expect(tokens == [0: 4, 1: 4])
            }
        }

        @Test func aStartAndAStopStringAreTold() async throws {
            try await withPool { _, model in
                let request = ChatRequest(
                    messages: [.user("What is 12 plus 30?")], options: GenerationOptions(temperature: 0, stop: ["no", "42"]))
                var prompt = 0
                for round in 0..<2 {
                    let generation = try model.generate(request, options: RequestOptions(reportsStart: true))
                    var events: [GenerationEvent] = []
                    for try await event in generation { events.append(event) }
                    guard case .started(let promptTokens, let cachedTokens) = events.first else {
                        Issue.record("the first event is \(String(describing: events.first))")
                        return
                    }
                    #expect(promptTokens > 1)
                    // The second time all but the last token is there.
                    if round == 0 { #expect(cachedTokens == 0) } else { #expect(cachedTokens == prompt - 1) }
                    prompt = promptTokens
                    guard case .finished(let completion) = events.last else {
                        Issue.record("the last event is \(String(describing: events.last))")
                        return
                    }
                    #expect(completion.reason == .stop && completion.stopString == "42")
                    #expect(completion.usage.promptTokens == promptTokens)
                }
                let session = ChatSession(model, options: GenerationOptions(temperature: 0, stop: ["42"]))
                #expect(try await session.respond(to: "What is 12 plus 30?").completion.stopString == "42")
                // Several answers, each with its own.
                var several = request
                several.others = ["n": 2]
                var stops: [String?] = []
                for try await event in try model.generate(several) {
                    if case .choiceFinished(_, _, let stopString) = event { stops.append(stopString) }
                }
                #expect(stops == ["42", "42"])
                // The model's own end is none.
                several.options.stop = ["no"]
                several.others = [:]
                let completion = try #require(try await model.generate(several).result().completion)
                #expect(completion.reason == .stop && completion.stopString == nil)
            }
        }

        @Test func aSlowReaderPausesTheModel() async throws {
            try await withPool { pool, model in
                func sampled() throws -> Double { try pool.metrics().models["tiny-chat"]?["completion_tokens"] ?? 0 }
                var events = try model.generate(endless(1500)).makeAsyncIterator()
                var tokens = 0
                func take(_ event: GenerationEvent?) {
                    if case .text(let piece) = event { tokens += piece.tokens.count }
                }
                take(try await events.next())
                // The library pauses an answer of which 1024 tokens are unread.
                #expect(await eventually { (try? sampled()) ?? 0 >= 1024 })
                try await Task.sleep(for: .milliseconds(300))
                let paused = try sampled()
                try await Task.sleep(for: .milliseconds(300))
                #expect(try sampled() == paused)
                #expect(paused < 1200)
                while let event = try await events.next() { take(event) }
                #expect(tokens == 1500)
            }
        }

        @Test func twoTasksCannotReadAtOnce() async throws {
            // One sequence at a time: the second request gets no event before the first one ends.
            var options = PoolOptions()
            options.maximumSequences = 1
            try await withPool(options) { _, model in
                let first = try model.generate(endless())
                var events = first.makeAsyncIterator()
                _ = try await events.next()
                let waiting = try model.generate(endless(1)).makeAsyncIterator()
                let tasks = (0..<2).map { _ in
                    Task {
                        var mine = waiting
                        return try await mine.next()
                    }
                }
                // Whoever comes second is refused, while the other one waits.
                let refused = try await withThrowingTaskGroup(of: OMLXError?.self) { group in
                    for task in tasks {
                        group.addTask {
                            do { _ = try await task.value } catch let error as OMLXError { return error }
                            return nil
                        }
                    }
                    let refused = try await group.next() ?? nil
                    first.cancel()
                    return refused
                }
                #expect(refused?.code == .invalidArgument)
            }
        }

        @Test func aGenerationIsReadOnce() async throws {
            try await withPool { _, model in
                let generation = try model.generate(endless(3))
                _ = try await generation.result()
                let error = try await failure(OMLXError.self) { try await generation.result() }
                #expect(error.code == .invalidArgument)
            }
        }
    }
}
