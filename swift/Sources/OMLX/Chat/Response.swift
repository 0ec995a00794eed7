import Foundation

/// A whole answer of a session.
public struct Response<Content: Sendable>: Sendable {
    /// The answer.
    public let content: Content
    /// What the model thought before.
    public let reasoning: String
    /// What the turn added to the transcript: the prompt, tool calls with their results, the answer.
    public let messages: [ChatMessage]
    /// How it ended; the usage is that of all requests of the turn.
    public let completion: Completion
}

extension Response {
    /// The same with another content.
    public func map<Other: Sendable>(_ transform: (Content) throws -> Other) rethrows -> Response<Other> {
        Response<Other>(
            content: try transform(content), reasoning: reasoning, messages: messages, completion: completion)
    }
}

extension Response: CustomStringConvertible {
    /// The content.
    public var description: String { "\(content)" }
}

extension Response where Content: Decodable {
    static func decode(_ text: String, reason: FinishReason) throws -> Content {
        do {
            return try JSONDecoder().decode(Content.self, from: Data(text.utf8))
        } catch {
            throw ResponseDecodingError(text: text, reason: reason, underlyingError: error)
        }
    }
}

/// An answer is not what was asked for: it was cut off, or its schema does not describe the type.
public struct ResponseDecodingError: Error, CustomStringConvertible {
    /// The answer.
    public let text: String
    /// Why it ended; `length` if it was cut off.
    public let reason: FinishReason
    /// What the decoder says.
    public let underlyingError: any Error

    public var description: String { "the answer, which ended with \(reason), cannot be decoded: \(underlyingError)" }
}

/// What happens while a session answers.
public enum ResponseEvent: Sendable, Hashable {
    /// The next piece of the answer; also of one that calls tools.
    case text(String)
    /// The next piece of what the model thinks.
    case reasoning(String)
    /// A call that was run, before its result.
    case toolCall(ToolCall)
    /// What came of it.
    case toolResult(ToolCall, String)
    /// The end. The turn is in the transcript.
    case finished(Completion)
}

/// The events of an answer, for one reader. They are pulled: nothing happens that nobody asks for. Leaving the loop, or
/// cancelling the task that reads, ends the turn.
public struct ResponseStream: AsyncSequence, Sendable {
    public typealias Element = ResponseEvent

    let session: ChatSession
    let prompt: String
    let options: GenerationOptions?

    /// Each iterator is a turn of its own.
    public func makeAsyncIterator() -> Iterator {
        Iterator(stream: self)
    }

    /// Reads the events of an answer.
    public struct Iterator: AsyncIteratorProtocol, Sendable {
        fileprivate let stream: ResponseStream
        private var turn: Turn?

        fileprivate init(stream: ResponseStream) {
            self.stream = stream
        }

        /// The next event; `nil` behind `finished`.
        public mutating func next() async throws -> ResponseEvent? {
            if turn == nil {
                turn = try await stream.session.begin(stream.prompt, format: nil, options: stream.options)
            }
            let event = try await turn?.next()
            if case .finished = event, let turn { await stream.session.commit(turn) }
            return event
        }
    }
}

/// The pieces of an answer's text, otherwise like `ResponseStream`.
public struct ResponseText: AsyncSequence, Sendable {
    public typealias Element = String

    let stream: ResponseStream

    /// Each iterator is a turn of its own.
    public func makeAsyncIterator() -> Iterator {
        Iterator(events: stream.makeAsyncIterator())
    }

    /// Reads the text of an answer.
    public struct Iterator: AsyncIteratorProtocol, Sendable {
        fileprivate var events: ResponseStream.Iterator

        /// The next piece; `nil` behind the last.
        public mutating func next() async throws -> String? {
            while let event = try await events.next() {
                if case .text(let text) = event { return text }
            }
            return nil
        }
    }
}
