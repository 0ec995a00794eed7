import COMLX

/// A running generation: a sequence of events that is read once.
///
/// Events are pulled, so a reader that pauses makes the model pause. The generation is cancelled when the loop over it is
/// left, when the task that reads it is cancelled (the loop throws `CancellationError` then), when nobody holds it any
/// more, or by `cancel()`.
///
///     for try await event in try pool.generate(request) {
///         if case .text(let piece) = event { print(piece.text, terminator: "") }
///     }
public final class Generation: AsyncSequence, Sendable {
    public typealias Element = GenerationEvent

    let request: RequestHandle
    private let isRead = Locked(false)

    init(_ request: RequestHandle) {
        self.request = request
    }

    /// Id of the model that answers, also where the request had an alias or none.
    public var modelID: String { request.modelID }

    /// Ends the generation: what has come so far can still be read, then `finished` with the reason `cancelled`.
    public func cancel() {
        request.cancel()
    }

    /// The iterator. A second one throws `invalidArgument`.
    public func makeAsyncIterator() -> Iterator {
        let isFirst = isRead.withLock { read in
            defer { read = true }
            return !read
        }
        return Iterator(reader: isFirst ? RequestReader(request) : nil, request: request)
    }

    /// Reads the events of a generation.
    public struct Iterator: AsyncIteratorProtocol, Sendable {
        let reader: RequestReader?
        let request: RequestHandle

        /// The next event; `nil` behind `finished`.
        public mutating func next() async throws -> GenerationEvent? {
            guard let reader else { throw OMLXError(.invalidArgument, "a generation can be read only once") }
            switch try await reader.next({ Event($0) }) {
            case .generation(let event): return event
            case .failed(let error, let usage) where error.code == .cancelled && request.isCancelledByHost:
                return .finished(Completion(reason: .cancelled, stopString: nil, usage: usage))
            case .failed(let error, _): throw error
            case .embeddings, .scores: throw OMLXError(.internal, "a generation has a result of another kind")
            case nil: return nil
            }
        }
    }

    /// Reads all of it. Text of several answers (`n`) is not told apart.
    public func result() async throws -> GenerationResult {
        var result = GenerationResult()
        for try await event in self { result.add(event) }
        return result
    }
}

/// What a generation gave, all together.
public struct GenerationResult: Sendable, Hashable {
    /// The answer.
    public private(set) var text = ""
    /// What the model thought before.
    public private(set) var reasoning = ""
    /// Calls of tools.
    public private(set) var toolCalls: [ToolCall] = []
    /// How it ended; `nil` as long as it has not.
    public private(set) var completion: Completion?

    /// Nothing yet.
    public init() {}

    /// Takes an event in.
    public mutating func add(_ event: GenerationEvent) {
        switch event {
        case .text(let piece): text += piece.text
        case .reasoning(let piece): reasoning += piece.text
        case .toolCall(let call):
            // Calls come one after the other.
            if toolCalls.last?.id != call.id { toolCalls.append(ToolCall(id: call.id, name: call.name, arguments: "")) }
            toolCalls[toolCalls.count - 1].arguments += call.piece.text
        case .finished(let completion): self.completion = completion
        case .loading, .started, .choiceFinished: break
        }
    }
}
