import COMLX

/// What a generation tells, in order; `finished` is the last one, unless the generation throws.
public enum GenerationEvent: Sendable, Hashable {
    /// The model is being loaded. Only with `RequestOptions.reportsLoading`.
    case loading(LoadingProgress)
    /// The prompt begins to be computed, and so many of its tokens are cached; until the end these may become more. Only with
    /// `RequestOptions.reportsStart`.
    case started(promptTokens: Int, cachedTokens: Int)
    /// A piece of the answer.
    case text(Piece)
    /// A piece of what the model thinks before it answers.
    case reasoning(Piece)
    /// A piece of a tool call.
    case toolCall(ToolCallPiece)
    /// The end of one of several answers, and the stop string that ended it; not sent for the only one.
    case choiceFinished(choice: Int, reason: FinishReason, stopString: String?)
    /// The end.
    case finished(Completion)
}

/// How far a model is loaded.
public struct LoadingProgress: Sendable, Hashable, Codable {
    /// Bytes of its weights that are there.
    public let loadedBytes: UInt64
    /// Bytes that there will be; 0 until that is known, and while the model waits for memory.
    public let totalBytes: UInt64
}

/// A piece of an answer. Pieces that nobody has fetched yet are merged.
public struct Piece: Sendable, Hashable {
    /// Whole characters. May be empty, while a character, a possible stop string or a mark is incomplete.
    public let text: String
    /// Which of several answers.
    public let choice: Int
    /// Ids of the tokens sampled since the last event.
    public let tokens: [UInt32]
    /// One for each token, if the request asked for them.
    public let logprobs: [TokenLogprob]
}

/// A piece of a tool call.
public struct ToolCallPiece: Sendable, Hashable {
    /// Which call of the answer, from 0.
    public let index: Int
    /// The call's id, the same in all its pieces.
    public let id: String
    /// The tool's name, the same in all its pieces. The model may have invented it.
    public let name: String
    /// The next piece of the arguments; all together are JSON.
    public let piece: Piece
}

/// Log-probability of a token: natural logarithm, before penalties and temperature.
public struct TokenLogprob: Sendable, Hashable {
    /// Token id.
    public let token: UInt32
    /// Its log-probability.
    public let logprob: Float
    /// Its bytes; may be a part of a character.
    public let bytes: [UInt8]
    /// The likeliest tokens in its place, best first; empty unless asked for.
    public let top: [TokenLogprob]
}

/// Why an answer ended. Open: newer libraries may know more reasons.
public struct FinishReason: RawRepresentable, Sendable, Hashable, Codable {
    /// The `omlx_finish_reason`.
    public let rawValue: UInt32

    /// The reason with that number.
    public init(rawValue: UInt32) {
        self.rawValue = rawValue
    }

    /// The model ended its turn, or a stop string came.
    public static let stop = Self(rawValue: OMLX_FINISH_REASON_STOP.rawValue)
    /// The most tokens, or the end of the context, were reached.
    public static let length = Self(rawValue: OMLX_FINISH_REASON_LENGTH.rawValue)
    /// `Generation.cancel` was called.
    public static let cancelled = Self(rawValue: OMLX_FINISH_REASON_CANCELLED.rawValue)
    /// The model awaits the results of tool calls.
    public static let toolCalls = Self(rawValue: OMLX_FINISH_REASON_TOOL_CALLS.rawValue)
}

extension FinishReason: CustomStringConvertible {
    public var description: String {
        switch self {
        case .stop: "stop"
        case .length: "length"
        case .cancelled: "cancelled"
        case .toolCalls: "toolCalls"
        default: "FinishReason(\(rawValue))"
        }
    }
}

/// The end of a request.
public struct Completion: Sendable, Hashable, Codable {
    /// Why it ended.
    public let reason: FinishReason
    /// The stop string that ended the answer; `nil` if none did.
    public let stopString: String?
    /// Counts and times.
    public let usage: Usage
}

/// Counts and times of a request.
public struct Usage: Sendable, Hashable, Codable {
    /// Tokens of the prompt.
    public var promptTokens = 0
    /// Those that a cache had already.
    public var cachedTokens = 0
    /// Tokens sampled.
    public var completionTokens = 0
    /// Those of them that were reasoning.
    public var reasoningTokens = 0
    /// From the start of the request to its first token; 0 if none came.
    public var secondsToFirstToken = 0.0
    /// Rate of the tokens after the first; 0 with fewer than two.
    public var tokensPerSecond = 0.0

    /// Nothing yet.
    public init() {}
}
