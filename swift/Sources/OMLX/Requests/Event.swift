import COMLX

/// A copy of an `omlx_event`, of whatever kind of request.
enum Event: Sendable {
    case generation(GenerationEvent)
    case embeddings(vectors: [[Float]], base64: String, truncated: Int)
    case scores([Float], order: [Int], truncated: Int)
    /// The done event of a request that failed or was cancelled.
    case failed(OMLXError, Usage)

    /// `nil` for kinds that this package does not know.
    init?(_ event: omlx_event) {
        switch event.kind {
        case OMLX_EVENT_KIND_TEXT.rawValue:
            self = .generation(.text(Piece(event)))
        case OMLX_EVENT_KIND_REASONING.rawValue:
            self = .generation(.reasoning(Piece(event)))
        case OMLX_EVENT_KIND_TOOL_CALL.rawValue:
            let call = ToolCallPiece(
                index: Int(event.tool_index), id: OMLX.text(event.tool_id), name: OMLX.text(event.tool_name),
                piece: Piece(event))
            self = .generation(.toolCall(call))
        case OMLX_EVENT_KIND_LOADING.rawValue:
            let progress = LoadingProgress(loadedBytes: event.loaded_bytes, totalBytes: event.total_bytes)
            self = .generation(.loading(progress))
        case OMLX_EVENT_KIND_STARTED.rawValue:
            let usage = Usage(event.usage)
            self = .generation(.started(promptTokens: usage.promptTokens, cachedTokens: usage.cachedTokens))
        case OMLX_EVENT_KIND_CHOICE_DONE.rawValue:
            let reason = FinishReason(rawValue: event.finish_reason)
            let choice = Int(event.choice)
            self = .generation(.choiceFinished(choice: choice, reason: reason, stopString: stopString(of: event)))
        case OMLX_EVENT_KIND_EMBEDDINGS.rawValue:
            let values = UnsafeBufferPointer(start: event.values, count: event.rows * event.columns)
            let vectors = (0..<event.rows).map { Array(values[$0 * event.columns..<($0 + 1) * event.columns]) }
            let base64 = OMLX.text(event.text, count: event.text_len)
            self = .embeddings(vectors: vectors, base64: base64, truncated: event.truncated)
        case OMLX_EVENT_KIND_SCORES.rawValue:
            let order = copy(event.order, count: event.order_count).map { Int($0) }
            self = .scores(copy(event.values, count: event.rows), order: order, truncated: event.truncated)
        case OMLX_EVENT_KIND_DONE.rawValue where event.status == success:
            let reason = FinishReason(rawValue: event.finish_reason)
            let completion = Completion(reason: reason, stopString: stopString(of: event), usage: Usage(event.usage))
            self = .generation(.finished(completion))
        case OMLX_EVENT_KIND_DONE.rawValue:
            let error = OMLXError(OMLXError.Code(rawValue: event.status), OMLX.text(event.error_message))
            self = .failed(error, Usage(event.usage))
        default:
            return nil
        }
    }
}

/// The stop string that ended an answer.
private func stopString(of event: omlx_event) -> String? {
    let string = text(event.stop_string)
    return string.isEmpty ? nil : string
}

extension Piece {
    fileprivate init(_ event: omlx_event) {
        text = OMLX.text(event.text, count: event.text_len)
        choice = Int(event.choice)
        tokens = copy(event.tokens, count: event.token_count)
        logprobs = copy(event.logprobs, count: event.logprob_count).map { TokenLogprob($0) }
    }
}

extension TokenLogprob {
    fileprivate init(_ item: omlx_token_logprob) {
        token = item.token
        logprob = item.logprob
        bytes = copy(item.bytes, count: item.byte_count)
        // Those have none of their own.
        top = copy(item.top, count: item.top_count).map { TokenLogprob($0) }
    }
}

extension Usage {
    init(_ usage: omlx_usage) {
        promptTokens = Int(clamping: usage.prompt_tokens)
        cachedTokens = Int(clamping: usage.cached_tokens)
        completionTokens = Int(clamping: usage.completion_tokens)
        reasoningTokens = Int(clamping: usage.reasoning_tokens)
        secondsToFirstToken = usage.seconds_to_first_token
        tokensPerSecond = usage.tokens_per_second
    }

    /// The usage of several requests of one turn: prompts and answers add up; the times are the first one's, and the rate
    /// the last one's.
    mutating func add(_ next: Usage) {
        promptTokens += next.promptTokens
        cachedTokens += next.cachedTokens
        completionTokens += next.completionTokens
        reasoningTokens += next.reasoningTokens
        if secondsToFirstToken == 0 { secondsToFirstToken = next.secondsToFirstToken }
        if next.tokensPerSecond > 0 { tokensPerSecond = next.tokensPerSecond }
    }
}
