/// A conversation with a model, which remembers what was said and calls tools.
///
///     let session = ChatSession(pool.model("tiny-chat"), instructions: "Answer in one sentence.")
///     print(try await session.respond(to: "What is 12 plus 30?").content)
///
/// It gives one answer at a time: a second request meanwhile throws `OMLXError` with the code `busy`. What a turn adds to the
/// transcript comes there when the answer is whole; a turn that fails, is cancelled or abandoned leaves no trace.
public actor ChatSession {
    /// Who answers.
    public nonisolated let model: Model
    /// What the model may call.
    public nonisolated let tools: [any Tool]
    /// How it answers, unless a request says otherwise.
    public nonisolated let options: GenerationOptions
    /// After so many answers with tool calls in one turn, the model is not told of the tools any more and has to answer.
    public nonisolated let maximumToolRounds: Int
    /// What was said so far.
    public private(set) var transcript: [ChatMessage]

    private nonisolated let responding = Locked(false)

    /// A session. It continues `transcript`, before which come the instructions.
    public init(
        _ model: Model, instructions: String? = nil, tools: [any Tool] = [],
        options: GenerationOptions = GenerationOptions(), transcript: [ChatMessage] = [], maximumToolRounds: Int = 16
    ) {
        self.model = model
        self.tools = tools
        self.options = options
        self.maximumToolRounds = maximumToolRounds
        self.transcript = (instructions.map { [.system($0)] } ?? []) + transcript
    }

    /// Whether an answer is under way.
    public nonisolated var isResponding: Bool { responding.withLock { $0 } }

    /// Loads the model, so that the first answer begins sooner.
    public nonisolated func prewarm() async throws {
        try await model.load()
    }

    /// Forgets what was said, but for the instructions.
    public func clear() throws {
        let place = try takePlace()
        transcript.removeAll { $0.role != .system }
        place.leave()
    }

    /// The answer to a prompt.
    public nonisolated func respond(to prompt: String, options: GenerationOptions? = nil) async throws -> Response<String> {
        try await respond(to: prompt, format: nil, options: options) { text, _ in text }
    }

    /// The answer to a prompt as a value: the model can write nothing but what `schema` describes, and `schema` should describe
    /// what `Content` decodes. Throws `ResponseDecodingError` if it cannot be decoded all the same, which is so if the most
    /// tokens were reached before it was whole.
    public nonisolated func respond<Content: Decodable & Sendable>(
        to prompt: String, as _: Content.Type = Content.self, schema: JSONSchema, options: GenerationOptions? = nil
    ) async throws -> Response<Content> {
        try await respond(to: prompt, format: .jsonSchema(schema), options: options) { text, reason in
            try Response.decode(text, reason: reason)
        }
    }

    /// The pieces of the answer's text. The prompt is sent when the first one is asked for.
    public nonisolated func streamResponse(to prompt: String, options: GenerationOptions? = nil) -> ResponseText {
        ResponseText(stream: streamDetails(to: prompt, options: options))
    }

    /// All that happens while the prompt is answered.
    public nonisolated func streamDetails(to prompt: String, options: GenerationOptions? = nil) -> ResponseStream {
        ResponseStream(session: self, prompt: prompt, options: options)
    }

    private nonisolated func respond<Content: Sendable>(
        to prompt: String, format: ResponseFormat?, options: GenerationOptions?,
        decode: @Sendable (String, FinishReason) throws -> Content
    ) async throws -> Response<Content> {
        var turn = try await begin(prompt, format: format, options: options)
        while let event = try await turn.next() {
            guard case .finished(let completion) = event else { continue }
            let content = try decode(turn.answer.text, completion.reason)
            let response = Response(
                content: content, reasoning: turn.answer.reasoning, messages: turn.messages, completion: completion)
            await commit(turn)
            return response
        }
        throw OMLXError(.internal, "an answer has no end")
    }

    nonisolated func begin(_ prompt: String, format: ResponseFormat?, options: GenerationOptions?) async throws -> Turn {
        let place = try takePlace()
        let request = ChatRequest(
            model: model.id, messages: await transcript, tools: tools.map(\.definition), options: options ?? self.options,
            format: format)
        return Turn(session: self, place: place, request: request, prompt: prompt)
    }

    /// Remembers a whole turn.
    func commit(_ turn: Turn) {
        transcript += turn.messages
        turn.place.leave()
    }

    private nonisolated func takePlace() throws -> Place {
        let isFree = responding.withLock { responding in
            defer { responding = true }
            return !responding
        }
        guard isFree else { throw OMLXError(.busy, "the session is answering already") }
        return Place(responding)
    }

    /// The place of the one turn of a session; free again when nobody holds it, or before.
    final class Place: Sendable {
        private let responding: Locked<Bool>
        private let isLeft = Locked(false)

        fileprivate init(_ responding: Locked<Bool>) {
            self.responding = responding
        }

        func leave() {
            let isFirst = isLeft.withLock { left in
                defer { left = true }
                return !left
            }
            if isFirst { responding.withLock { $0 = false } }
        }

        deinit {
            leave()
        }
    }
}
