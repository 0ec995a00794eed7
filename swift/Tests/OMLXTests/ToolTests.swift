import Foundation
import Testing

@testable import OMLX

private let greedy = GenerationOptions(temperature: 0, maximumResponseTokens: 200)
private let question = "What is the weather in Oslo?"

private struct Weather: Tool {
    struct Arguments: Decodable, Sendable { let city: String }
    struct Report: Encodable, Sendable {
        let temperature: Int
        let sky: String
    }
    struct Storm: Error {}

    let name: String
    let description = "Get the weather of a city."
    let parameters = JSONSchema.object(["city": .string])
    let asked = Locked<[String]>([])
    let answer: @Sendable () async throws -> Report

    init(
        name: String = "get_weather",
        answer: @escaping @Sendable () async throws -> Report = { Report(temperature: 7, sky: "rainy") }
    ) {
        self.name = name
        self.answer = answer
    }

    func call(arguments: Arguments) async throws -> Report {
        asked.withLock { $0.append(arguments.city) }
        return try await answer()
    }
}

extension LibraryTests {
    /// Tools that the model calls.
    @Suite struct Tools {
        @Test func theirResultsGoIntoTheAnswer() async throws {
            try await withPool { _, model in
                let weather = Weather()
                let session = ChatSession(model, tools: [weather], options: greedy)
                var events: [ResponseEvent] = []
                for try await event in session.streamDetails(to: question) { events.append(event) }
                #expect(weather.asked.withLock { $0 } == ["Oslo"])
                let calls = events.compactMap { event -> String? in
                    guard case .toolResult(let call, let result) = event else { return nil }
                    return "\(call.name): \(result)"
                }
                #expect(calls == [#"get_weather: {"sky":"rainy","temperature":7}"#])
                let answer = events.reduce(into: "") { if case .text(let text) = $1 { $0 += text } }
                #expect(answer.contains("rainy"))
                #expect(await session.transcript.map(\.role) == [.user, .assistant, .tool, .assistant])
                guard case .finished(let completion) = events.last else {
                    Issue.record("no end")
                    return
                }
                #expect(completion.reason == .stop)
            }
        }

        @Test func theModelIsToldOfItsMistakes() async throws {
            try await withPool { _, model in
                let weather = Weather()
                let unknown = ToolCall(id: "1", name: "get_weather", arguments: #"{"town":"Oslo"}"#)
                let told = try await weather.run(unknown)
                #expect(told.hasPrefix("error: "))
                #expect(weather.asked.withLock { $0 }.isEmpty)
                let right = ToolCall(id: "1", name: "get_weather", arguments: #"{"city":"Oslo"}"#)
                let report = try await weather.run(right)
                #expect(report.contains("rainy"))
            }
        }

        @Test func whatTheyThrowEndsTheAnswer() async throws {
            try await withPool { _, model in
                let session = ChatSession(model, tools: [Weather { throw Weather.Storm() }], options: greedy)
                let error = try await failure(ToolCallError.self) { try await session.respond(to: question) }
                #expect(error.tool == "get_weather")
                #expect(error.underlyingError is Weather.Storm)
                #expect(await session.transcript.isEmpty)
                #expect(!session.isResponding)
            }
        }

        @Test func theyAreCancelledWithTheTask() async throws {
            try await withPool { _, model in
                let (started, start) = AsyncStream.makeStream(of: Void.self)
                let weather = Weather {
                    start.yield()
                    try await Task.sleep(for: .seconds(60))
                    return Weather.Report(temperature: 0, sky: "")
                }
                let session = ChatSession(model, tools: [weather], options: greedy)
                let task = Task { try await session.respond(to: question) }
                for await _ in started { break }
                task.cancel()
                await #expect(throws: CancellationError.self) { try await task.value }
                #expect(!session.isResponding)
            }
        }

        @Test func thereIsAnEndToCalling() async throws {
            try await withPool { _, model in
                let weather = Weather()
                let session = ChatSession(model, tools: [weather], options: greedy, maximumToolRounds: 0)
                let response = try await session.respond(to: question)
                #expect(weather.asked.withLock { $0 }.isEmpty)
                #expect(!response.content.isEmpty)
            }
        }

        @Test func callsStream() async throws {
            try await withPool { _, model in
                let request = ChatRequest(
                    messages: [.user(question)], tools: [Weather().definition], toolChoice: .tool("get_weather"),
                    options: greedy)
                var pieces: [ToolCallPiece] = []
                var result = GenerationResult()
                for try await event in try model.generate(request) {
                    if case .toolCall(let piece) = event { pieces.append(piece) }
                    result.add(event)
                }
                #expect(pieces.count > 2)
                #expect(result.completion?.reason == .toolCalls)
                #expect(result.toolCalls.map(\.name) == ["get_weather"])
                let arguments = try JSONValue(json: try #require(result.toolCalls.first).arguments)
                #expect(arguments == ["city": "Oslo"])
            }
        }
    }
}
