import Foundation
import Testing

@testable import OMLX

private let greedy = GenerationOptions(temperature: 0)

extension LibraryTests {
    /// Conversations.
    @Suite struct Sessions {
        @Test func aConversationIsRemembered() async throws {
            try await withPool { _, model in
                let facts = "Remember these facts:\nThe code of the red box is 4821.\nTom has a cat called Luna."
                let session = ChatSession(model, instructions: facts, options: greedy)
                let code = try await session.respond(to: "What is the code of the red box?")
                #expect(code.content == "The code of the red box is 4821.")
                #expect("\(code)" == code.content)
                var pieces: [String] = []
                for try await text in session.streamResponse(to: "What is the name of Tom's cat?") { pieces.append(text) }
                #expect(pieces.joined() == "Tom's cat is called Luna.")
                #expect(pieces.count > 1)
                let transcript = await session.transcript
                #expect(transcript.map(\.role) == [.system, .user, .assistant, .user, .assistant])
                #expect(transcript.last?.content == "Tom's cat is called Luna.")
                // The second prompt began with what the first turn had left in the cache.
                #expect(try model.cache.stats().cachedTokens ?? 0 > 40)
                try await session.clear()
                #expect(await session.transcript.map(\.role) == [.system])
            }
        }

        @Test func manyAtATimeKeepToThemselves() async throws {
            try await withPool { _, model in
                try await withThrowingTaskGroup(of: Void.self) { group in
                    for number in 0..<8 {
                        group.addTask {
                            let code = 4211 + 567 * number
                            let session = ChatSession(
                                model, instructions: "Remember these facts:\nThe code of the red box is \(code).",
                                options: greedy)
                            for _ in 0..<2 {
                                let answer = try await session.respond(to: "What is the code of the red box?").content
                                #expect(answer == "The code of the red box is \(code).")
                            }
                        }
                    }
                    try await group.waitForAll()
                }
            }
        }

        @Test func oneAnswerAtATime() async throws {
            try await withPool { _, model in
                let session = ChatSession(model, options: greedy)
                var events = session.streamDetails(to: "Tell me a short story about a fox.").makeAsyncIterator()
                #expect(!session.isResponding)
                _ = try await events.next()
                #expect(session.isResponding)
                let error = try await failure(OMLXError.self) { try await session.respond(to: "Hello") }
                #expect(error.code == .busy)
                await #expect(throws: OMLXError.self) { try await session.clear() }
                while let event = try await events.next() {
                    if case .finished = event { #expect(!session.isResponding) }
                }
                #expect(!(try await session.respond(to: "Hello").content.isEmpty))
            }
        }

        @Test func whatIsAbandonedLeavesNoTrace() async throws {
            try await withPool { _, model in
                let session = ChatSession(model, options: greedy)
                for try await _ in session.streamResponse(to: "Tell me a short story about a fox.") { break }
                #expect(!session.isResponding)
                let task = Task { try await session.respond(to: "Tell me a short story about a fox.") }
                while !session.isResponding { await Task.yield() }
                task.cancel()
                await #expect(throws: CancellationError.self) { try await task.value }
                #expect(!session.isResponding)
                #expect(await session.transcript.isEmpty)
                let failing = ChatSession(model.pool.model("nobody"))
                let error = try await failure(OMLXError.self) { try await failing.respond(to: "Hello") }
                #expect(error.code == .notFound)
                #expect(await failing.transcript.isEmpty)
                #expect(!failing.isResponding)
            }
        }

        struct Person: Decodable, Equatable {
            let name: String
            let city: String
            let age: Int
        }

        static let schema = JSONSchema.object(["name": .string, "city": .string, "age": .integer(in: 0...150)])
        static let mia = "Extract name, city, age as JSON:\nName: Mia\nAge: 34\nCity: Lisbon"

        @Test func answersAreValues() async throws {
            try await withPool { _, model in
                let session = ChatSession(model, options: greedy)
                let response = try await session.respond(to: Self.mia, as: Person.self, schema: Self.schema)
                #expect(response.content == Person(name: "Mia", city: "Lisbon", age: 34))
                #expect(response.completion.reason == .stop)
                #expect(await session.transcript == response.messages)
                // Whatever is asked, it is a person.
                let other: Response<Person> = try await session.respond(
                    to: "Tell me a short story about a fox.", schema: Self.schema,
                    options: GenerationOptions(temperature: 0, maximumResponseTokens: 200))
                #expect((0...150).contains(other.content.age))
            }
        }

        @Test func aValueThatWasCutOffIsAnError() async throws {
            try await withPool { _, model in
                let session = ChatSession(model)
                let short = GenerationOptions(temperature: 0, maximumResponseTokens: 4)
                let error = try await failure(ResponseDecodingError.self) {
                    try await session.respond(to: Self.mia, as: Person.self, schema: Self.schema, options: short)
                }
                #expect(error.reason == .length)
                #expect(error.text.hasPrefix("{"))
                #expect(await session.transcript.isEmpty)
            }
        }
    }
}
