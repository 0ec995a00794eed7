/// One turn of a session: the prompt, answers that call tools with their results, and the last answer. It goes on as far as
/// its reader asks, and ends when nobody holds it.
struct Turn: Sendable {
    let session: ChatSession
    let place: ChatSession.Place
    /// What the turn adds to the transcript.
    private(set) var messages: [ChatMessage]
    /// The answer as far as it has come, without those that called tools before it.
    private(set) var answer = GenerationResult()

    private var request: ChatRequest
    private let earlier: [ChatMessage]
    private var generation: Generation.Iterator?
    private var usage = Usage()
    private var rounds = 0
    private var isOver = false
    /// Events that are known already, in order.
    private var pending: [ResponseEvent] = []

    init(session: ChatSession, place: ChatSession.Place, request: ChatRequest, prompt: String) {
        self.session = session
        self.place = place
        self.request = request
        earlier = request.messages
        messages = [.user(prompt)]
    }

    /// The next event; `nil` behind `finished`, and after an error.
    mutating func next() async throws -> ResponseEvent? {
        guard pending.isEmpty else { return pending.removeFirst() }
        guard !isOver else { return nil }
        do {
            while true {
                if let event = try await step() { return event }
                if !pending.isEmpty { return pending.removeFirst() }
            }
        } catch {
            isOver = true
            generation = nil
            place.leave()
            throw error
        }
    }

    private mutating func step() async throws -> ResponseEvent? {
        var events = try generation ?? start()
        let event = try await events.next()
        generation = events
        guard let event else { throw OMLXError(.internal, "an answer has no end") }
        answer.add(event)
        switch event {
        case .text(let piece): return piece.text.isEmpty ? nil : .text(piece.text)
        case .reasoning(let piece): return piece.text.isEmpty ? nil : .reasoning(piece.text)
        case .finished(let completion): try await finish(completion)
        case .toolCall, .loading, .started, .choiceFinished: break
        }
        return nil
    }

    private mutating func start() throws -> Generation.Iterator {
        request.messages = earlier + messages
        if rounds >= session.maximumToolRounds, !request.tools.isEmpty { request.toolChoice = ToolChoice.none }
        answer = GenerationResult()
        return try session.model.pool.generate(request).makeAsyncIterator()
    }

    /// The end of an answer: of the turn, too, or tools are called and the next one begins.
    private mutating func finish(_ completion: Completion) async throws {
        generation = nil
        usage.add(completion.usage)
        // An answer that was cut off may end with half a call.
        let calls = completion.reason == .toolCalls ? answer.toolCalls : []
        messages.append(
            ChatMessage(role: .assistant, content: answer.text, reasoning: answer.reasoning, toolCalls: calls))
        guard !calls.isEmpty else {
            isOver = true
            let whole = Completion(reason: completion.reason, stopString: completion.stopString, usage: usage)
            pending.append(.finished(whole))
            return
        }
        rounds += 1
        for (call, result) in zip(calls, try await Self.run(calls, with: session.tools)) {
            messages.append(.tool(result, callID: call.id))
            pending += [.toolCall(call), .toolResult(call, result)]
        }
    }

    /// Runs calls at the same time; results are in the order of the calls.
    private static func run(_ calls: [ToolCall], with tools: [any Tool]) async throws -> [String] {
        try await withThrowingTaskGroup(of: (Int, String).self) { group in
            for (index, call) in calls.enumerated() {
                group.addTask {
                    guard let tool = tools.first(where: { $0.name == call.name }) else {
                        return (index, "error: there is no tool of this name")
                    }
                    return (index, try await tool.run(call))
                }
            }
            var results = [String](repeating: "", count: calls.count)
            for try await (index, result) in group { results[index] = result }
            return results
        }
    }
}
